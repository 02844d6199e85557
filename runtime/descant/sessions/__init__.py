"""Sessions, streams and operations: what a client comes back to after a lost connection."""

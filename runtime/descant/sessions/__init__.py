"""Sessions with their streams and operations: everything that outlives a lost connection of a client."""

"""The actor runtime: refs, mailboxes, supervision, actors in child processes. It knows nothing of models."""

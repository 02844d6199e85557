"""One module per on-disk adapter format."""

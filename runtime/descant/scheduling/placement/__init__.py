"""Places on the device: adapter slots, arena bytes and the order of loads; runs of free blocks."""

"""Data that cross a process boundary: step plans, adapter versions, messages of the children. No torch."""

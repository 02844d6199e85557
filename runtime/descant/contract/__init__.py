"""What crosses a process boundary: step plans, adapter versions, messages to the children. No torch."""

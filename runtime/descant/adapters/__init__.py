"""Heavy adapter work, done in the worker process: reading, checking, summing and storing. Torch, no asyncio."""

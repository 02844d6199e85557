"""The engine: a step plan in, a step result out. Torch lives here; asyncio does not."""

"""Client of a Descant server: asyncio, typed messages, no torch."""

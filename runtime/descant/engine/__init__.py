"""The engine: turns step plans into step results. Uses torch, never asyncio."""

"""An adapter version on disk and in memory: low-rank factors, draft heads, the store."""

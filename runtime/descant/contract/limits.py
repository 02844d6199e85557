"""`AdapterLimits`: limits on the size of an adapter and on the time its patterns take."""

import msgspec


class AdapterLimits(msgspec.Struct, frozen=True):
    """Limits on the content of adapters. `max_extent_bytes` None: only the arena's size limits a version."""

    max_rank: int = 1024  # of one module of one adapter; a sum may have more
    max_draft_heads: int = 16
    max_draft_layers: int = 8  # residual blocks of one head
    max_file_bytes: int = 8 << 30  # of all files with tensors together
    max_config_bytes: int = 4 << 20
    max_extent_bytes: int | None = None  # in the device arena
    pattern_budget_s: float = 5.0  # for all regular expressions of one adapter together

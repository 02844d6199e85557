"""`AdapterVersion`: what the rest of the system knows of one effective adapter version. The tensors stay on disk."""

import msgspec


class AdapterVersion(msgspec.Struct, frozen=True):
    """An immutable, prepared adapter: one normalized file in the store.

    `digest` (sha256, hex) identifies its content, whatever name or source it came from; the file's name is the
    digest. `num_bytes` is its extent in the device arena, in the dtype the model is served in; `file_bytes` is what
    the file takes in the store. `num_heads` is how many draft heads it has; one with heads alone touches no module.
    """

    digest: str
    path: str
    num_bytes: int
    max_rank: int
    num_modules: int
    file_bytes: int = 0
    num_heads: int = 0  # draft heads

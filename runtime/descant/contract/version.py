"""`AdapterVersion`: the description of one effective adapter version, without its tensors."""

import msgspec


class AdapterVersion(msgspec.Struct, frozen=True):
    """An immutable, prepared adapter: one normalized file in the store.

    `digest` (sha256, hex) identifies its content, independent of name and source. It is also the file's name.
    `num_bytes` is the size of its extent in the device arena, in the dtype the model is served in. `file_bytes` is the
    size of its file in the store. `num_heads` counts its draft heads; a version with heads alone has no modules.
    """

    digest: str
    path: str
    num_bytes: int
    max_rank: int
    num_modules: int
    file_bytes: int = 0
    num_heads: int = 0

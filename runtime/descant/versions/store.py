"""The store of normalized versions: one safetensors file per effective version, named by the digest of its content.

A file holds one flat float32 tensor `data`, laid out as in `extent`, so that reading a version is one read and one
hash. Its metadata list the modules with factors, the fingerprint of the base and the shape of the draft heads. The
header is canonical: content and file determine each other, byte by byte. A file is written under a temporary name,
synced and renamed, so that a visible file is complete. A damaged file is rewritten when its adapter is next prepared.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, BinaryIO, NamedTuple

import msgspec
import torch

from descant.model.arch import LoraModule
from descant.versions.draft_heads import HeadsShape
from descant.versions.durable import remove_abandoned, sync
from descant.versions.extent import Extent, extent_elements, pack, unpack
from descant.versions.low_rank import LowRankAdapter
from descant_client.errors import AdapterInvalid

FORMAT = "descant-version-4"
_FOLDER = "versions"
_TEMPORARY = ".partial"
_MAX_HEADER_BYTES = 16 << 20  # about 100,000 modules
_LENGTH_BYTES = 8  # of the header's length, little-endian, before the header (safetensors format)
_DAMAGED = "its file in the store is damaged"


class StoredVersion(NamedTuple):
    """A version's file and its size in bytes."""

    digest: str
    path: Path
    num_bytes: int


def base_fingerprint(modules: Sequence[LoraModule]) -> str:
    """Return a digest of the modules' names and shapes, in order: the meaning of module indices."""
    lines = (f"{module.name} {module.in_features} {module.out_features}\n" for module in modules)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_version(store_dir: Path, adapter: LowRankAdapter, modules: Sequence[LoraModule]) -> StoredVersion:
    """Store an adapter. An existing sound file has the same content and is kept.

    `store_dir` is created if necessary. Raises OSError if it cannot be written.
    """
    extent, base = pack(adapter, modules), base_fingerprint(modules)
    tables = _encode_tables(extent)
    header = _encode_header(base, tables, extent.data.numel())
    digest = _content_digest(base, tables, extent.data)
    path = store_dir / _FOLDER / f"{digest}.safetensors"
    if not _is_sound(path, modules):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, header, extent.data)
    return StoredVersion(digest, path, len(header) + extent.data.nbytes)


def sweep(store_dir: Path) -> None:
    """Remove temporary files that killed writers left behind. Other servers may write to the same store."""
    remove_abandoned((store_dir / _FOLDER).glob(f".*{_TEMPORARY}"))


def read_version(path: Path, modules: Sequence[LoraModule], adapter: str | None = None) -> LowRankAdapter:
    """Read a version as `read_extent` does. Its factors and heads are views of one tensor."""
    return unpack(read_extent(path, modules, adapter), modules)


def read_extent(path: Path, modules: Sequence[LoraModule], adapter: str | None = None) -> Extent:
    """Read a version into new memory and verify its content against the digest in its file name.

    Errors name it `adapter`, or by its digest.

    Raises:
        AdapterInvalid: the file is missing, damaged, of another format, or made for another base.
    """
    name = adapter or path.stem
    base = base_fingerprint(modules)
    try:
        with path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            header = _read_header(file)
            tables = _read_tables(name, header, base)
            extent = _allocate(name, tables, modules, max_elements=num_bytes // 4)
            is_whole = num_bytes == len(header) + extent.data.nbytes
            if not is_whole or header != _encode_header(base, tables, extent.data.numel()):
                raise AdapterInvalid(name, _DAMAGED)
            is_whole = file.readinto(_bytes_of(extent.data)) == extent.data.nbytes
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise AdapterInvalid(name, f"its file in the store cannot be read: {exc}") from exc
    if not is_whole or _content_digest(base, tables, extent.data) != path.stem:
        raise AdapterInvalid(name, _DAMAGED)
    return extent


# ---- parts of the file ----------------------------------------------------------------------------------------------


class _Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The table entry of a module with factors."""

    rank: Annotated[int, msgspec.Meta(ge=1)]
    scaling: float


class _Tables(NamedTuple):
    """The contents of a file, in JSON."""

    modules: str  # entries by module index
    heads: str  # a HeadsShape; empty without heads


class _Metadata(msgspec.Struct, frozen=True, omit_defaults=True):
    """The safetensors metadata, which are strings. The last two are `_Tables`."""

    format: str = ""
    base: str = ""
    modules: str = ""
    heads: str = ""


class _TensorInfo(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[int]
    data_offsets: list[int]


class _Header(msgspec.Struct, frozen=True):
    metadata: _Metadata = msgspec.field(name="__metadata__", default=_Metadata())
    data: _TensorInfo | None = None


def _encode_tables(extent: Extent) -> _Tables:
    entries = enumerate(zip(extent.ranks, extent.scalings, strict=True))
    modules = msgspec.json.encode({index: _Entry(*entry) for index, entry in entries if entry[0]})
    return _Tables(modules.decode(), msgspec.json.encode(extent.heads).decode() if extent.heads else "")


def _encode_header(base: str, tables: _Tables, num_elements: int) -> bytes:
    """Return the bytes before the data."""
    info = _TensorInfo("F32", [num_elements], [0, 4 * num_elements])
    text = msgspec.json.encode(_Header(_Metadata(FORMAT, base, *tables), info))
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _read_header(file: BinaryIO) -> bytes:
    length = file.read(_LENGTH_BYTES)
    return length + file.read(min(int.from_bytes(length, "little"), _MAX_HEADER_BYTES))


def _read_tables(name: str, header: bytes, base: str) -> _Tables:
    metadata = msgspec.json.decode(header[_LENGTH_BYTES:], type=_Header).metadata
    if (metadata.format, metadata.base) != (FORMAT, base):
        raise AdapterInvalid(name, "its file in the store was made for another base model or format")
    return _Tables(metadata.modules, metadata.heads)


def _allocate(name: str, tables: _Tables, modules: Sequence[LoraModule], max_elements: int) -> Extent:
    """Return an uninitialized extent of the size given by the tables. Raises AdapterInvalid beyond `max_elements`."""
    entries = msgspec.json.decode(tables.modules, type=dict[int, _Entry])
    heads = msgspec.json.decode(tables.heads, type=HeadsShape) if tables.heads else None
    ranks, scalings = [0] * len(modules), [1.0] * len(modules)
    for index, entry in entries.items():
        if not 0 <= index < len(modules):
            raise AdapterInvalid(name, f"its file in the store names a module {index} the base does not have")
        ranks[index], scalings[index] = entry.rank, entry.scaling
    num_elements = extent_elements(ranks, modules, heads)
    if num_elements > max_elements:
        raise AdapterInvalid(name, _DAMAGED)
    return Extent(torch.empty(num_elements), ranks, scalings, heads)


def _content_digest(base: str, tables: _Tables, data: torch.Tensor) -> str:
    """Return the sha256 of the base's fingerprint, the tables and the data.

    Without heads the digest is the same as in the format before heads, so that names keep their versions. The files are
    rewritten.
    """
    lines = (line for line in (base, *tables) if line)
    digest = hashlib.sha256("".join(f"{line}\n" for line in lines).encode())
    digest.update(_bytes_of(data))
    return digest.hexdigest()


def _bytes_of(data: torch.Tensor) -> memoryview:
    """Return the memory of the data, without a copy."""
    return data.view(torch.uint8).numpy().data


# ---- writing --------------------------------------------------------------------------------------------------------


def _is_sound(path: Path, modules: Sequence[LoraModule]) -> bool:
    try:
        read_extent(path, modules)
    except AdapterInvalid:
        return False
    return True


def _write_atomically(path: Path, header: bytes, data: torch.Tensor) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=_TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(header)
            file.write(_bytes_of(data))
        sync(Path(temporary))
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise

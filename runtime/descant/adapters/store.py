"""The store of normalized versions: one safetensors file per effective version, named by the digest of its content.

A file holds `{module index}.A` and `{module index}.B`, float32, and says which base's modules the indices mean.
It is written under a temporary name, synced and renamed, so that a visible file is a whole one; should it be damaged
all the same, it is written anew when its adapter is next prepared.
"""

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from descant.adapters.low_rank import Factors, LowRankAdapter
from descant.engine.arch import LoraModule
from descant_client.errors import AdapterInvalid

FORMAT = "descant-version-1"
ABANDONED_AFTER_S = 3600.0
"""Age from which a temporary file belongs to a writer that was killed: nobody writes one version for so long."""

_FOLDER = "versions"
_TEMPORARY = ".partial"


def base_fingerprint(modules: Sequence[LoraModule]) -> str:
    """Return a digest of the names and shapes that module indices stand for."""
    lines = (f"{module.name} {module.in_features} {module.out_features}\n" for module in modules)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_version(store_dir: Path, adapter: LowRankAdapter, modules: Sequence[LoraModule]) -> tuple[str, Path]:
    """Store an adapter and return its digest and its file. A sound file already there is the same content and is kept.

    `store_dir` is created if need be. Raises OSError if it cannot be written.
    """
    index_by_name = {module.name: index for index, module in enumerate(modules)}
    factors = {index_by_name[name]: pair for name, pair in adapter.factors.items()}
    base = base_fingerprint(modules)
    digest = _content_digest(factors, base)
    path = store_dir / _FOLDER / f"{digest}.safetensors"
    if not _is_sound(path, modules):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, factors, {"format": FORMAT, "base": base})
    return digest, path


def sweep(store_dir: Path) -> None:
    """Remove temporary files that killed writers left behind. Other servers may be writing theirs: these are young."""
    for path in (store_dir / _FOLDER).glob(f".*{_TEMPORARY}"):
        with contextlib.suppress(OSError):  # another server sweeps too, or the store is not ours to clean
            if time.time() - path.stat().st_mtime > ABANDONED_AFTER_S:
                path.unlink()


def read_version(path: Path, modules: Sequence[LoraModule], adapter: str | None = None) -> dict[int, Factors]:
    """Read a version by module index, verifying its content against the digest in its name.

    Errors call it `adapter`, or by its digest.

    Raises:
        AdapterInvalid: missing, damaged, made for another base, or of shapes that do not fit `modules`.
    """
    name = adapter or path.stem
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as exc:
        raise AdapterInvalid(name, f"its file in the store cannot be read: {exc}") from exc
    base = base_fingerprint(modules)
    if metadata.get("format") != FORMAT or metadata.get("base") != base:
        raise AdapterInvalid(name, "its file in the store was made for another base model or format")
    factors = _pair(name, tensors, modules)
    if _content_digest(factors, base) != path.stem:
        raise AdapterInvalid(name, "its file in the store is damaged; it is written anew when the server next starts")
    return factors


def _is_sound(path: Path, modules: Sequence[LoraModule]) -> bool:
    try:
        read_version(path, modules)
    except AdapterInvalid:
        return False
    return True


def _pair(name: str, tensors: Mapping[str, torch.Tensor], modules: Sequence[LoraModule]) -> dict[int, Factors]:
    factors: dict[int, Factors] = {}
    indices = {key.partition(".")[0] for key in tensors}
    if {f"{index}.{side}" for index in indices for side in "AB"} != tensors.keys():
        raise AdapterInvalid(name, "its file in the store lacks tensors or holds foreign ones")
    for index in sorted(int(index) if index.isdecimal() else -1 for index in indices):
        if not 0 <= index < len(modules):
            raise AdapterInvalid(name, f"its file in the store names a module {index} the base does not have")
        pair = Factors(tensors[f"{index}.A"], tensors[f"{index}.B"])
        module = modules[index]
        shapes = (pair.rank, module.in_features), (module.out_features, pair.rank)
        if (tuple(pair.a.shape), tuple(pair.b.shape)) != shapes or {pair.a.dtype, pair.b.dtype} != {torch.float32}:
            raise AdapterInvalid(name, f"its file in the store has wrong tensors for {module.name}")
        factors[index] = pair
    return factors


def _content_digest(factors: Mapping[int, Factors], base: str) -> str:
    """sha256 over the base's fingerprint and tensor names, shapes and bytes in order of module index."""
    digest = hashlib.sha256(f"{base}\n".encode())
    for index in sorted(factors):
        for side, tensor in (("A", factors[index].a), ("B", factors[index].b)):
            digest.update(f"{index}.{side} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _write_atomically(path: Path, factors: Mapping[int, Factors], metadata: dict[str, str]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for index in sorted(factors):
        # Clones, as safetensors refuses tensors that share storage.
        tensors[f"{index}.A"] = factors[index].a.clone(memory_format=torch.contiguous_format)
        tensors[f"{index}.B"] = factors[index].b.clone(memory_format=torch.contiguous_format)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=_TEMPORARY)
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        _sync(Path(temporary))
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""The worker's operations on adapters: storing versions made from directories or combinations, and exporting them."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from descant.adapters.create import choose_targets, create
from descant.adapters.directory import write_directory
from descant.adapters.export import check_exportable, is_adapter, write_adapter
from descant.adapters.formats.read import read_adapter
from descant.adapters.merge import combine
from descant.adapters.merged_checkpoint import write_merged
from descant.contract.child_config import AdapterLimits
from descant.contract.engine import Dtype
from descant.contract.version import AdapterVersion
from descant.model.base_model import BaseModel
from descant.versions.draft_heads import HeadsShape
from descant.versions.extent import extent_bytes, module_ranks
from descant.versions.low_rank import LowRankAdapter
from descant.versions.store import read_version, sweep, write_version
from descant_client.errors import AdapterInvalid, AdapterTooLarge
from descant_client.lifecycle import Combination

_DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class AdapterWorker:
    """Preparation and export of versions for one base model. Stateless between calls; any thread may call it."""

    def __init__(
        self, base_dir: str | Path, store_dir: str | Path, dtype: Dtype, limits: AdapterLimits | None = None
    ) -> None:
        """Read the base's config and clean up the store. `dtype` is that in which the model is served.

        Raises:
            ModelInvalid: the base cannot be served.
        """
        self._base = BaseModel.open(base_dir)
        self._store_dir = Path(store_dir)
        self._dtype = _DTYPES[dtype]
        self._limits = limits or AdapterLimits()
        sweep(self._store_dir)

    def prepare(self, name: str, directory: str | Path) -> AdapterVersion:
        """Read the adapter in `directory`, check it and store it. Errors name it `name`.

        Raises:
            AdapterInvalid, AdapterUnsupported: as `read_adapter`. AdapterTooLarge: the files, or the extent on the
            device, are over the limit. OSError: the store cannot be written.
        """
        return self._store(name, read_adapter(name, Path(directory), self._base, self._limits))

    def compose(self, name: str, members: Sequence[tuple[AdapterVersion, float]], how: Combination) -> AdapterVersion:
        """Store a combination of prepared versions with weights. Errors name it `name`.

        The order of members does not matter: one combination is one version. It has no draft heads, except those of a
        single member with weight 1.

        Raises:
            AdapterInvalid: a member's file is damaged, or a weight or a product with it is not finite; or as `combine`.
            AdapterTooLarge: the extent on the device is over the limit. OSError: the store cannot be written.
        """
        ordered = sorted(members, key=lambda member: (member[0].digest, member[1]))
        if not ordered or not all(math.isfinite(weight) for _, weight in ordered):
            raise AdapterInvalid(name, "a sum needs members, with finite weights")
        read: list[tuple[LowRankAdapter, float]] = []
        ranks = [0] * len(self._base.modules)  # of the sum of the members read so far
        for version, weight in ordered:
            read.append((self._read(name, version), weight))
            added = module_ranks(read[-1][0], self._base.modules)
            ranks = [rank + more for rank, more in zip(ranks, added, strict=True)]
            if how.type == "cat":
                self._check_size(name, ranks)  # before more members are read or combined
        return self._store(name, combine(name, read, how))

    def create(self, name: str, rank: int, alpha: float | None, target_modules: Sequence[str] | None) -> AdapterVersion:
        """Store a new adapter, which changes nothing yet. Arguments as in `create.choose_targets`.

        Raises:
            AdapterInvalid, AdapterUnsupported: as `create.choose_targets`. AdapterTooLarge: the extent on the device
            is over the limit. OSError: the store cannot be written.
        """
        targets = choose_targets(name, self._base, rank, alpha, target_modules, self._limits)
        ranks = {target.module.name: target.rank for target in targets}
        self._check_size(name, [ranks.get(module.name, 0) for module in self._base.modules])
        return self._store(name, create(targets))

    def with_heads(self, name: str, version: AdapterVersion | None, heads_version: AdapterVersion) -> AdapterVersion:
        """Store the factors of one version, or none, with the draft heads of another.

        Draft heads of `version` are left out. Errors name the result `name`.

        Raises:
            AdapterInvalid: `heads_version` has no heads, or a file is damaged. AdapterTooLarge: the extent on the
            device is over the limit. OSError: the store cannot be written.
        """
        heads = self._read(name, heads_version).heads
        if heads is None:
            raise AdapterInvalid(name, "the adapter whose draft heads are wanted has none")
        factors = {} if version is None else self._read(name, version).factors
        return self._store(name, LowRankAdapter(factors, heads))

    def export(self, name: str, version: AdapterVersion, directory: str | Path) -> int:
        """Write a version as a directory, which may replace another adapter's. Return the bytes of its files.

        Factors become PEFT files, draft heads Medusa files. Missing parts have no files.

        Raises:
            AdapterInvalid: the version's file is damaged, or the version has neither part. InvalidRequest: the
            directory is not allowed or cannot be written.
        """
        adapter = self._read(name, version)
        check_exportable(name, adapter)
        return write_directory(
            Path(directory), lambda staging: write_adapter(adapter, self._base, staging), self._kept(), is_adapter
        )

    def export_merged(self, name: str, version: AdapterVersion, directory: str | Path) -> int:
        """Write base and version, merged, as a Hugging Face checkpoint without draft heads. Return its size in bytes.

        Raises:
            AdapterInvalid, ModelInvalid: as `write_merged`, or the version's file is damaged. InvalidRequest: as
            `export`.
        """
        adapter = self._read(name, version)
        return write_directory(
            Path(directory), lambda staging: write_merged(name, adapter, self._base, staging), self._kept()
        )

    def _kept(self) -> tuple[Path, Path]:
        return self._base.directory, self._store_dir

    def _read(self, name: str, version: AdapterVersion) -> LowRankAdapter:
        """Return a stored version. Raises AdapterInvalid with its digest if its file is missing or damaged."""
        try:
            return read_version(Path(version.path), self._base.modules, name)
        except AdapterInvalid as error:
            raise AdapterInvalid(name, error.reason, version.digest) from error

    def _store(self, name: str, adapter: LowRankAdapter) -> AdapterVersion:
        ranks = module_ranks(adapter, self._base.modules)
        heads = adapter.heads and adapter.heads.shape
        num_bytes = self._check_size(name, ranks, heads)
        self._check_range(name, adapter)
        digest, path, file_bytes = write_version(self._store_dir, adapter, self._base.modules)
        num_modules, num_heads = sum(rank > 0 for rank in ranks), heads.num_heads if heads else 0
        return AdapterVersion(digest, str(path), num_bytes, max(ranks), num_modules, file_bytes, num_heads)

    def _check_size(self, name: str, ranks: Sequence[int], heads: HeadsShape | None = None) -> int:
        """Return the size of a version on the device in bytes. Raises AdapterTooLarge over the limit."""
        num_bytes = extent_bytes(ranks, self._base.modules, self._dtype.itemsize, heads)
        max_bytes = self._limits.max_extent_bytes
        if max_bytes is not None and num_bytes > max_bytes:
            raise AdapterTooLarge(name, num_bytes, max_bytes)
        return num_bytes

    def _check_range(self, name: str, adapter: LowRankAdapter) -> None:
        """Raise AdapterInvalid for values beyond the range of the served dtype, which would become infinite there."""
        for module, pair in adapter.factors.items():
            self._check_tensors(name, module, (pair.a, pair.scaled_b()))
        for number, tensors in enumerate(zip(*adapter.heads.tensors(), strict=True) if adapter.heads else ()):
            self._check_tensors(name, f"draft head {number}", tensors)

    def _check_tensors(self, name: str, owner: str, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if not bool(tensor.to(self._dtype).isfinite().all()):
                raise AdapterInvalid(name, f"values of {owner} leave the range of {self._dtype}")

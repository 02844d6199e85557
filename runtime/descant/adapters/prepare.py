"""What the worker process does for adapters: a directory or a sum in, an `AdapterVersion` in the store out."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from descant.adapters.base import BaseModel
from descant.adapters.compose import weighted_sum
from descant.adapters.limits import AdapterLimits
from descant.adapters.low_rank import LowRankAdapter
from descant.adapters.read import read_adapter
from descant.adapters.store import read_version, sweep, write_version
from descant.engine.arch import Dtype
from descant.engine.arena import extent_bytes
from descant.scheduling.version import AdapterVersion
from descant_client.errors import AdapterInvalid, AdapterTooLarge

_DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class AdapterWorker:
    """Prepares adapter versions for one base model. Synchronous; keeps no tensors between calls."""

    def __init__(
        self, base_dir: str | Path, store_dir: str | Path, dtype: Dtype, limits: AdapterLimits | None = None
    ) -> None:
        """Read the base's config and clean up the store. `dtype` is the one the model is served in.

        Raises:
            ModelInvalid: the base cannot be served.
        """
        self._base = BaseModel.open(base_dir)
        self._store_dir = Path(store_dir)
        self._dtype = _DTYPES[dtype]
        self._limits = limits or AdapterLimits()
        sweep(self._store_dir)

    def prepare(self, name: str, directory: str | Path) -> AdapterVersion:
        """Read the adapter in `directory`, check it and put it into the store. Errors call it `name`.

        Raises:
            AdapterInvalid, AdapterUnsupported: as `formats.peft`. AdapterTooLarge: the file, or its extent on the
            device, is over the limit. OSError: the store cannot be written.
        """
        return self._store(name, read_adapter(name, Path(directory), self._base, self._limits))

    def compose(self, name: str, members: Sequence[tuple[AdapterVersion, float]]) -> AdapterVersion:
        """Put the weighted sum of prepared versions into the store. Errors call it `name`.

        The order of members does not matter: one sum is one version.

        Raises:
            AdapterInvalid: a member's file is damaged, or a weight or a product with it is not finite.
            AdapterTooLarge: the sum's extent on the device is over the limit. OSError: the store cannot be written.
        """
        ordered = sorted(members, key=lambda member: (member[0].digest, member[1]))
        if not ordered or not all(math.isfinite(weight) for _, weight in ordered):
            raise AdapterInvalid(name, "a sum needs members, with finite weights")
        return self._store(name, weighted_sum([(self._read(name, version), weight) for version, weight in ordered]))

    def _read(self, name: str, version: AdapterVersion) -> LowRankAdapter:
        factors = read_version(Path(version.path), self._base.modules, name)
        return LowRankAdapter({self._base.modules[index].name: pair for index, pair in factors.items()})

    def _store(self, name: str, adapter: LowRankAdapter) -> AdapterVersion:
        modules = self._base.modules
        ranks = [adapter.factors[module.name].rank if module.name in adapter.factors else 0 for module in modules]
        num_bytes = extent_bytes(ranks, modules, self._dtype.itemsize)
        max_bytes = self._limits.max_extent_bytes
        if max_bytes is not None and num_bytes > max_bytes:
            raise AdapterTooLarge(name, num_bytes, max_bytes)
        self._check_range(name, adapter)
        digest, path = write_version(self._store_dir, adapter, modules)
        return AdapterVersion(digest, str(path), num_bytes, max(ranks), sum(rank > 0 for rank in ranks))

    def _check_range(self, name: str, adapter: LowRankAdapter) -> None:
        """Refuse what leaves the range of the dtype it is served in: it would turn into infinities on the device."""
        for module, pair in adapter.factors.items():
            for tensor in (pair.a, pair.b):
                if not bool(tensor.to(self._dtype).isfinite().all()):
                    raise AdapterInvalid(name, f"values of {module} leave the range of {self._dtype}")

"""How a version's factors lie in one flat tensor: the same in the store's files and in the arena, in every dtype.

Module after module in the order of the LoRA tables, each pair as `descant_kernels.PairLayout` has it, the padding
zeros. Modules that are not touched take no room.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from descant.adapters.low_rank import Factors, LowRankAdapter
from descant.engine import pieces
from descant.engine.arch import LoraModule
from descant_kernels import PairLayout


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """A version in one piece. Lists are per module of the base; a rank of 0 means untouched."""

    data: Tensor  # [extent elements] float32 on the CPU; B as in `Factors`, without its scaling
    ranks: list[int]
    scalings: list[float]


def extent_offsets(ranks: Sequence[int], modules: Sequence[LoraModule]) -> list[int]:
    """Return where each module's pair begins, in elements, and at the end how many elements the extent has."""
    return [0, *accumulate(_layout(rank, module).size for rank, module in zip(ranks, modules, strict=True))]


def extent_bytes(ranks: Sequence[int], modules: Sequence[LoraModule], itemsize: int) -> int:
    """Return how many bytes a version takes in an arena whose elements have `itemsize` bytes."""
    return extent_offsets(ranks, modules)[-1] * itemsize


def module_ranks(adapter: LowRankAdapter, modules: Sequence[LoraModule]) -> list[int]:
    """Return an adapter's rank per module of the base."""
    return [adapter.factors[module.name].rank if module.name in adapter.factors else 0 for module in modules]


def pack(adapter: LowRankAdapter, modules: Sequence[LoraModule]) -> Extent:
    """Copy an adapter into one flat tensor.

    Raises:
        KeyError: a module that the base does not have.
    """
    if foreign := adapter.factors.keys() - {module.name for module in modules}:
        raise KeyError(f"modules {sorted(foreign)} are not the base's")
    ranks = module_ranks(adapter, modules)
    scalings = [
        adapter.factors[module.name].scaling if rank else 1.0 for module, rank in zip(modules, ranks, strict=True)
    ]
    data = torch.zeros(extent_offsets(ranks, modules)[-1])
    extent = Extent(data, ranks, scalings)
    for name, views in unpack(extent, modules).factors.items():
        views.a.copy_(adapter.factors[name].a)
        views.b.copy_(adapter.factors[name].b)
    return extent


def unpack(extent: Extent, modules: Sequence[LoraModule]) -> LowRankAdapter:
    """Return the adapter an extent holds; its factors are views of the extent's data."""
    starts = extent_offsets(extent.ranks, modules)[:-1]
    factors: dict[str, Factors] = {}
    for module, rank, scaling, start in zip(modules, extent.ranks, extent.scalings, starts, strict=True):
        if rank:
            factors[module.name] = Factors(*_layout(rank, module).views(extent.data, start), scaling)
    return LowRankAdapter(factors)


def apply_scalings(extent: Extent, modules: Sequence[LoraModule]) -> None:
    """Multiply every B by its scaling, in place: what kernels multiply with, as `Factors.scaled_b`."""
    starts = extent_offsets(extent.ranks, modules)[:-1]
    slices: list[Tensor] = []
    scalings: list[float] = []
    for module, rank, scaling, start in zip(modules, extent.ranks, extent.scalings, starts, strict=True):
        if rank and scaling != 1.0:
            layout = _layout(rank, module)
            slices.append(extent.data[start + layout.b_start : start + layout.size])
            scalings.append(scaling)
    pieces.multiply(slices, scalings)  # it runs beside the step loop


def _layout(rank: int, module: LoraModule) -> PairLayout:
    return PairLayout.of(rank, module.in_features, module.out_features)

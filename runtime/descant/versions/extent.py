"""The layout of a version in one flat tensor: the same in the store's files and in the arena, in every dtype.

Modules follow each other in the order of the LoRA tables, each pair laid out by `descant_kernels.PairLayout`. Draft
heads, if any, follow, laid out by `HeadsLayout`. The padding is zeros. Untouched modules take no room.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from descant.model.arch import LoraModule
from descant.versions import pieces
from descant.versions.draft_heads import HeadsLayout, HeadsShape
from descant.versions.low_rank import Factors, LowRankAdapter
from descant_kernels import PairLayout


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """A version in one flat tensor. Lists are per module of the base; rank 0 means untouched."""

    data: Tensor  # [extent elements] float32 on the CPU; B as in `Factors`, without its scaling
    ranks: list[int]
    scalings: list[float]
    heads: HeadsShape | None = None


def extent_offsets(ranks: Sequence[int], modules: Sequence[LoraModule]) -> list[int]:
    """Return the first element of each module's pair and, as the last entry, that of the heads."""
    return [0, *accumulate(_layout(rank, module).size for rank, module in zip(ranks, modules, strict=True))]


def heads_layout(shape: HeadsShape, modules: Sequence[LoraModule]) -> HeadsLayout:
    """Return the layout of heads for the base with these modules. The last module is its LM head."""
    return HeadsLayout(shape, modules[-1].in_features, modules[-1].out_features)


def extent_elements(ranks: Sequence[int], modules: Sequence[LoraModule], heads: HeadsShape | None = None) -> int:
    """Return the number of elements of an extent."""
    return extent_offsets(ranks, modules)[-1] + (heads_layout(heads, modules).size if heads else 0)


def extent_bytes(
    ranks: Sequence[int], modules: Sequence[LoraModule], itemsize: int, heads: HeadsShape | None = None
) -> int:
    """Return the bytes of a version in an arena with elements of `itemsize` bytes."""
    return extent_elements(ranks, modules, heads) * itemsize


def module_ranks(adapter: LowRankAdapter, modules: Sequence[LoraModule]) -> list[int]:
    """Return an adapter's rank per module of the base."""
    return [adapter.factors[module.name].rank if module.name in adapter.factors else 0 for module in modules]


def pack(adapter: LowRankAdapter, modules: Sequence[LoraModule]) -> Extent:
    """Copy an adapter into one flat tensor.

    Raises:
        KeyError: the adapter has a module that the base lacks.
    """
    if foreign := adapter.factors.keys() - {module.name for module in modules}:
        raise KeyError(f"modules {sorted(foreign)} are not the base's")
    ranks = module_ranks(adapter, modules)
    scalings = [
        adapter.factors[module.name].scaling if rank else 1.0 for module, rank in zip(modules, ranks, strict=True)
    ]
    shape = adapter.heads and adapter.heads.shape
    extent = Extent(torch.zeros(extent_elements(ranks, modules, shape)), ranks, scalings, shape)
    packed = unpack(extent, modules)
    for name, views in packed.factors.items():
        views.a.copy_(adapter.factors[name].a)
        views.b.copy_(adapter.factors[name].b)
    if packed.heads and adapter.heads:
        for view, tensor in zip(packed.heads.tensors(), adapter.heads.tensors(), strict=True):
            assert view.shape == tensor.shape, "heads have the width of the base they were read for"
            view.copy_(tensor)
    return extent


def unpack(extent: Extent, modules: Sequence[LoraModule]) -> LowRankAdapter:
    """Return the adapter in an extent. Its factors and heads are views of the extent's data."""
    *starts, heads_start = extent_offsets(extent.ranks, modules)
    factors: dict[str, Factors] = {}
    for module, rank, scaling, start in zip(modules, extent.ranks, extent.scalings, starts, strict=True):
        if rank:
            factors[module.name] = Factors(*_layout(rank, module).views(extent.data, start), scaling)
    heads = heads_layout(extent.heads, modules).views(extent.data, heads_start) if extent.heads else None
    return LowRankAdapter(factors, heads)


def apply_scalings(extent: Extent, modules: Sequence[LoraModule]) -> None:
    """Multiply every B by its scaling, in place. The result is the B that kernels use, as in `Factors.scaled_b`."""
    starts = extent_offsets(extent.ranks, modules)[:-1]
    slices: list[Tensor] = []
    scalings: list[float] = []
    for module, rank, scaling, start in zip(modules, extent.ranks, extent.scalings, starts, strict=True):
        if rank and scaling != 1.0:
            layout = _layout(rank, module)
            slices.append(extent.data[start + layout.b_start : start + layout.size])
            scalings.append(scaling)
    pieces.multiply(slices, scalings)  # in pieces, because this runs beside the step loop


def _layout(rank: int, module: LoraModule) -> PairLayout:
    return PairLayout.of(rank, module.in_features, module.out_features)

"""What goes between host and device without anybody waiting: small tensors and adapters.

On the CPU there is nothing to wait for: `upload` and `Download` hand out what they are given, `HostUploader` copies at
once. On a CUDA device small tensors go and come through pinned memory on the stream that computes, and adapters go on
a stream of their own, so that they arrive while steps run.

Never run on a GPU yet: `_upload_packed`, the event of `Download`, and all of `SideStreamUploader`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import accumulate
from typing import Any, Protocol, TypeVarTuple, cast

import torch
from torch import Tensor

from descant.versions import pieces

Ts = TypeVarTuple("Ts")

_ALIGNMENT_BYTES = 16  # of every tensor in a packed upload: enough for any dtype

# ---- small tensors ------------------------------------------------------------------------------------------------

Mark = torch.cuda.Event | None
"""A point in the work queued on a device; None where work is done as soon as it is queued."""


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return CPU tensors on a device, by one transfer that the host does not wait for.

    Args:
      tensors: any shapes and dtypes, small ones; they may change as soon as this returns, unless the device is the CPU.
    """
    return list(tensors) if device.type == "cpu" else _upload_packed(tensors, device)


def upload_fields(objects: tuple[*Ts], device: torch.device) -> tuple[*Ts]:
    """Return copies of dataclass instances whose tensor fields are on a device, by one transfer as in `upload`."""
    named = [
        {field.name: value for field in fields(cast(Any, one)) if isinstance(value := getattr(one, field.name), Tensor)}
        for one in objects
    ]
    moved = iter(upload([tensor for tensors in named for tensor in tensors.values()], device))
    return cast(
        "tuple[*Ts]",
        tuple(
            replace(cast(Any, one), **{name: next(moved) for name in tensors})
            for one, tensors in zip(objects, named, strict=True)
        ),
    )


def _upload_packed(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """All tensors side by side in one pinned buffer, which the allocator keeps until the copy is done."""
    packed, starts = pack(tensors, pin=True)
    on_device = packed.to(device, non_blocking=True)
    return unpack(on_device, starts, tensors)


def pack(tensors: Sequence[Tensor], pin: bool = False) -> tuple[Tensor, list[int]]:
    """Return the tensors' bytes side by side, `[num_bytes]` uint8, and where each begins."""
    sizes = [-(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for tensor in tensors]
    starts = [0, *accumulate(sizes)]
    packed = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pin)
    for view, tensor in zip(unpack(packed, starts, tensors), tensors, strict=True):
        view.copy_(tensor)
    return packed, starts[:-1]


def unpack(packed: Tensor, starts: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of packed bytes, with the shapes and dtypes of the tensors that were packed."""
    return [
        packed[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, like, strict=False)
    ]


class Download:
    """Device tensors on their way to the host."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Queue the copies behind what is queued already. CPU tensors are kept as they are."""
        self._event: Mark = None
        self._tensors = list(tensors)
        if any(tensor.is_cuda for tensor in tensors):
            self._tensors = [
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
                for tensor in tensors
            ]
            self._event = torch.cuda.Event()
            self._event.record()

    def block_until_copied(self) -> list[Tensor]:
        """Block until the copies are done and return the tensors on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


# ---- adapters -----------------------------------------------------------------------------------------------------


class Uploader(Protocol):
    """How adapters get to the device, and what orders that with the steps."""

    def stage(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a CPU tensor in a dtype, where `copy` can read it without waiting. Any thread may call this."""
        ...

    def copy(self, target: Tensor, staged: Tensor, after: Sequence[Mark]) -> Mark:
        """Begin to copy what `stage` returned once the marks have passed; the mark returned passes when it is there."""
        ...

    def order_after(self, mark: Mark) -> None:
        """Make the work queued from now on begin after the mark has passed. The host does not block."""
        ...

    def mark(self) -> Mark:
        """Return a mark that passes when all steps queued so far are done."""
        ...


class HostUploader:
    """For the CPU: everything is done when it returns."""

    def stage(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Uploader`."""
        if dtype == data.dtype:
            return data
        staged = torch.empty(data.shape, dtype=dtype)
        pieces.copy(staged, data)
        return staged

    def copy(self, target: Tensor, staged: Tensor, after: Sequence[Mark]) -> Mark:
        """See `Uploader`."""
        target.copy_(staged)

    def order_after(self, mark: Mark) -> None:
        """See `Uploader`."""

    def mark(self) -> Mark:
        """See `Uploader`."""


class SideStreamUploader:
    """For a CUDA device: copies from pinned memory on a stream of their own, beside the steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._sources: list[tuple[torch.cuda.Event, Tensor]] = []  # pinned memory that a copy may still read

    def stage(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Uploader`."""
        staged = torch.empty(data.shape, dtype=dtype, pin_memory=True)
        pieces.copy(staged, data)
        return staged

    def copy(self, target: Tensor, staged: Tensor, after: Sequence[Mark]) -> Mark:
        """See `Uploader`."""
        self._sources = [(event, source) for event, source in self._sources if not event.query()]
        for mark in after:
            if mark is not None:
                self._stream.wait_event(mark)
        with torch.cuda.stream(self._stream):
            target.copy_(staged, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        self._sources.append((arrived, staged))
        return arrived

    def order_after(self, mark: Mark) -> None:
        """See `Uploader`."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

    def mark(self) -> Mark:
        """See `Uploader`."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event


def uploader_for(device: torch.device) -> Uploader:
    """Return the uploader of a device."""
    return SideStreamUploader(device) if device.type == "cuda" else HostUploader()

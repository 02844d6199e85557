"""Transfers between host and device that block neither: small tensors and adapters.

On the CPU, `upload` and `Download` return their arguments, and `HostUploader` copies at once. On a CUDA device small
tensors are transferred through pinned memory on the compute stream. Adapters are transferred on a stream of their own,
so that the copies overlap steps.

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

_ALIGNMENT_BYTES = 16  # of every tensor in a packed upload; sufficient for any dtype

# ---- small tensors ------------------------------------------------------------------------------------------------

Mark = torch.cuda.Event | None
"""A point in the work queued on a device. It passes when the work before it is done. None: already passed."""


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return CPU tensors on a device, in one transfer, without blocking the host.

    Args:
      tensors: small, of any shapes and dtypes. Unless the device is the CPU they may be changed after the call.
    """
    return list(tensors) if device.type == "cpu" else _upload_packed(tensors, device)


def upload_fields(objects: tuple[*Ts], device: torch.device) -> tuple[*Ts]:
    """Return copies of dataclass instances with all tensor fields on a device, in one transfer as in `upload`."""
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
    """Upload all tensors through one pinned buffer, which the allocator keeps until the copy is done."""
    packed, starts = pack(tensors, pin=True)
    on_device = packed.to(device, non_blocking=True)
    return unpack(on_device, starts, tensors)


def pack(tensors: Sequence[Tensor], pin: bool = False) -> tuple[Tensor, list[int]]:
    """Return the concatenated bytes of tensors, `[num_bytes]` uint8, and the start of each."""
    sizes = [-(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for tensor in tensors]
    starts = [0, *accumulate(sizes)]
    packed = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pin)
    for view, tensor in zip(unpack(packed, starts, tensors), tensors, strict=True):
        view.copy_(tensor)
    return packed, starts[:-1]


def unpack(packed: Tensor, starts: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of packed bytes, with the shapes and dtypes of the packed tensors."""
    return [
        packed[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, like, strict=False)
    ]


class Download:
    """A transfer of device tensors to the host."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Queue the copies after the work queued so far. CPU tensors are not copied."""
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
    """The upload of adapters to the device, ordered with the steps."""

    def stage(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a CPU tensor in a dtype, in memory that `copy` reads without blocking. Any thread may call this."""
        ...

    def copy(self, target: Tensor, staged: Tensor, after: Sequence[Mark]) -> Mark:
        """Queue the copy of a staged tensor after the given marks. The returned mark passes when the copy is done."""
        ...

    def order_after(self, mark: Mark) -> None:
        """Make the work queued from now on begin after the mark has passed. The host does not block."""
        ...

    def mark(self) -> Mark:
        """Return a mark that passes when all steps queued so far are done."""
        ...


class HostUploader:
    """An uploader for the CPU: every call completes before it returns."""

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
    """An uploader for a CUDA device: it copies from pinned memory on its own stream, in parallel with the steps."""

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

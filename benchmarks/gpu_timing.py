"""Timing on a GPU: ops with a cold cache, steps queued one behind the other, and the floors of both."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from descant.engine.graphs import Capture
from descant.model.arch import DecoderConfig

REPEATS = 30
STEPS = 20  # per timing of steps: queued one behind the other, as the engine does
FLUSH_BYTES = 256 << 20  # written before each repeat of an op, so that nothing is left in the cache
DTYPE = torch.bfloat16
Op = Callable[[], object]


@dataclass
class Line:
    """One measurement. `aim` is the project's target in words; `reached` is the measured value of that target."""

    name: str
    seconds: float
    floor_s: float
    plain_s: dict[str, float] = field(default_factory=dict)
    aim: str = ""
    reached: str = ""

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table: microseconds, and the times of the alternatives as multiples of the op's."""
        plain = ", ".join(f"{name} {seconds / self.seconds:.2f}×" for name, seconds in self.plain_s.items())
        times = (f"{self.seconds * 1e6:.1f}", f"{self.floor_s * 1e6:.1f}", f"{self.floor_s / self.seconds:.0%}")
        return (self.name, *times, plain or "–", self.aim or "–", self.reached or "–")


HEADS = ("what", "µs", "floor µs", "of floor", "alternatives", "aim", "reached")


@dataclass
class Bench:
    """The device, the timers and the measured rates of a benchmark."""

    device: torch.device
    config: DecoderConfig
    time_op: Callable[[Op], float]  # median seconds of one call, cold cache
    time_steps: Callable[[Op], float]  # median seconds of a call among many, queued
    capture: Capture
    bandwidth: float  # bytes per second
    flops: float  # per second

    def floor(self, num_bytes: float, num_flops: float = 0.0) -> float:
        """Return the least time in seconds."""
        return max(num_bytes / self.bandwidth, num_flops / self.flops)

    def randn(self, *shape: int, std: float = 1.0) -> Tensor:
        """Return random values in the model's dtype."""
        return torch.empty(shape, device=self.device, dtype=DTYPE).normal_(std=std)


def time_op(op: Op) -> float:
    """Return the median seconds of an op. The flush before it also gives the host time to launch it."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    return statistics.median([_elapsed(op, flush) for _ in range(REPEATS + 3)][3:])


def time_steps(step: Op) -> float:
    """Return the median seconds per step, of `STEPS` steps queued without waiting."""

    def queue() -> None:
        for _ in range(STEPS):
            step()

    return statistics.median([_elapsed(queue) for _ in range(5)][1:]) / STEPS


def _elapsed(op: Op, flush: Tensor | None = None) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
    if flush is not None:
        flush.zero_()
    begin.record()
    op()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure_bandwidth(bench: Bench) -> float:
    """Return the bytes per second of a large copy, reads and writes together."""
    source = torch.empty(1 << 30, dtype=torch.int8, device=bench.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / bench.time_op(lambda: target.copy_(source))


def measure_flops(bench: Bench, size: int = 8192) -> float:
    """Return the FLOPs per second of a large matrix product."""
    a, b = bench.randn(size, size), bench.randn(size, size)
    return 2.0 * size**3 / bench.time_op(lambda: a @ b)

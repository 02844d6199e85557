"""The training loop of the demo's parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def descend(
    label: str,
    optimizers: Sequence[Optimizer],
    schedules: Sequence[LRScheduler],
    loss_at: Callable[[int], torch.Tensor],
    *,
    steps: int,
    report_every: int,
    clipped: Iterable[torch.nn.Parameter] = (),
) -> None:
    """Take a number of steps down the gradient of `loss_at(step)`, with the gradient norm of `clipped` limited to 1."""
    clipped = list(clipped)
    started, losses = time.monotonic(), 0.0
    for step in range(steps):
        loss = loss_at(step)
        loss.backward()
        if clipped:
            torch.nn.utils.clip_grad_norm_(clipped, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        losses += loss.item()
        if (step + 1) % report_every == 0:
            seconds = time.monotonic() - started
            print(f"{label}: step {step + 1} of {steps}, loss {losses / report_every:.4f}, {seconds:.0f} s", flush=True)
            losses = 0.0

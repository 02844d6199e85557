"""Waiting for the registry, and telling the client if it takes long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

SILENCE_S = 0.25  # after which a client that waits is told what for

Answer = TypeVar("Answer")


async def break_silence(work: Coroutine[Any, Any, Answer], tell: Callable[[], None]) -> Answer:
    """Return what `work` does, and `tell` once if that takes longer than `SILENCE_S`. Cancelling cancels the work."""
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait([task], timeout=SILENCE_S)
        if not done:
            tell()
        return await task
    finally:
        task.cancel()

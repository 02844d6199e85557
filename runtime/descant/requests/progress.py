"""Progress messages for clients that wait long for the registry."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

REPORT_AFTER_S = 0.25  # time without an answer after which the client gets a progress message

Answer = TypeVar("Answer")


async def report_if_slow(work: Coroutine[Any, Any, Answer], report: Callable[[], None]) -> Answer:
    """Return the result of `work`. Call `report` once if it takes longer than `REPORT_AFTER_S`.

    Cancelling cancels the work.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait([task], timeout=REPORT_AFTER_S)
        if not done:
            report()
        return await task
    finally:
        task.cancel()

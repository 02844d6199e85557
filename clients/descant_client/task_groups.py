"""Task groups without their exception groups."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, cast

import anyio


def first_leaf(exc: BaseException, *, if_alone: bool = False) -> BaseException:
    """Return the first exception in nested exception groups; an exception that is no group is returned as it is.

    With `if_alone`, stop at a group of several exceptions and return that group.
    """
    while isinstance(exc, BaseExceptionGroup):
        first, *others = cast("BaseExceptionGroup[BaseException]", exc).exceptions
        if others and if_alone:
            break
        exc = first
    return exc


@asynccontextmanager
async def running_beside(work: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Run `work` in a task for the length of the block, and cancel it at the end of the block.

    An exception of the block or of `work` is raised as itself, in no group. An exception of `work` cancels the block.
    """
    failure: BaseException | None = None
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            try:
                yield
            except asyncio.CancelledError:
                raise
            except BaseException as exc:  # noqa: BLE001 - raised below: the task group would wrap it
                failure = exc
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise first_leaf(group) from failure
    if failure is not None:
        raise failure

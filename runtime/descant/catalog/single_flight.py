"""`SingleFlight`: work done once for all concurrent callers, with a cache of the results.

An error contains the name under which its caller gave the adapter. So callers share work in flight only if they have
the same label, which is this name. Results are shared by all callers.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

MAX_RESULTS = 4096

ResultT = TypeVar("ResultT")


class SingleFlight(Generic[ResultT]):
    """Results by key. The first caller starts the work, later ones wait for it. Failures are not kept.

    The work runs as a task of its own, started with an actor's `start_soon`, so no caller's cancellation stops it.
    """

    def __init__(self, start_soon: Callable[..., None], max_results: int = MAX_RESULTS) -> None:
        self._start_soon = start_soon
        self._max_results = max_results
        self._results: OrderedDict[str, ResultT] = OrderedDict()  # the least recently used first
        # By key and label. The result of a flight that `put` has removed from here is not kept.
        self._flights: dict[str, dict[str, _Flight[ResultT]]] = {}

    async def run(
        self,
        key: str,
        label: str,
        work: Callable[[], Awaitable[ResultT]],
        claim: Callable[[ResultT], None] = lambda result: None,
    ) -> ResultT:
        """Return the result of `key`, running `work` if it is neither kept nor in flight for this label.

        `claim` is called with the result. No other task runs between the end of the work and the claims of all callers
        that waited for it. Raises the error of the work.
        """
        if key in self._results:
            self._results.move_to_end(key)
            claim(self._results[key])
            return self._results[key]
        flights = self._flights.setdefault(key, {})
        if label not in flights:
            flights[label] = _Flight()
            self._start_soon(self._fly, key, label, flights[label], work)
        flight = flights[label]
        flight.claims.append(claim)
        return await asyncio.shield(flight.result)

    def put(self, key: str, result: ResultT) -> None:
        """Keep a result that was made elsewhere. The least recently used ones are dropped if there are too many.

        It is newer than work in flight, whose results go to their waiting callers and are not kept.
        """
        self._flights.pop(key, None)
        self._results[key] = result
        self._results.move_to_end(key)
        while len(self._results) > self._max_results:
            self._results.popitem(last=False)

    def drop(self, is_stale: Callable[[ResultT], bool]) -> None:
        """Forget the kept results that are stale. Work in flight is not affected."""
        for key in [key for key, result in self._results.items() if is_stale(result)]:
            del self._results[key]

    def __len__(self) -> int:
        return len(self._results)

    async def _fly(
        self, key: str, label: str, flight: _Flight[ResultT], work: Callable[[], Awaitable[ResultT]]
    ) -> None:
        try:
            result = await work()
        except Exception as exc:  # noqa: BLE001 - handed to every caller
            flight.result.set_exception(exc)
            flight.result.exception()  # marks it as retrieved, as every caller may be cancelled
        else:
            if self._flights.get(key, {}).get(label) is flight:
                self.put(key, result)
            for claim in flight.claims:
                claim(result)
            flight.result.set_result(result)
        finally:
            self._end(key, label, flight)
            flight.result.cancel()  # has an effect only at the end of the actor's life

    def _end(self, key: str, label: str, flight: _Flight[ResultT]) -> None:
        flights = self._flights.get(key, {})
        if flights.get(label) is flight:
            del flights[label]
        if not flights:
            self._flights.pop(key, None)


class _Flight(Generic[ResultT]):
    def __init__(self) -> None:
        self.result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.claims: list[Callable[[ResultT], None]] = []

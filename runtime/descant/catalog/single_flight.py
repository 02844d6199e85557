"""Work that is done once for all who want its result, and results that are kept for those who come later.

An error speaks of things by the words of who asked. So work is shared only by callers of one label, which stands for
these words; its result is everybody's.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

MAX_RESULTS = 4096

ResultT = TypeVar("ResultT")


class SingleFlight(Generic[ResultT]):
    """Results by key. The first caller has the work started, the others wait for it; a failure is not remembered.

    The work runs as a task of its own, begun with `start_soon` (an actor's): no caller's cancellation disturbs it.
    """

    def __init__(self, start_soon: Callable[..., None], max_results: int = MAX_RESULTS) -> None:
        self._start_soon = start_soon
        self._max_results = max_results
        self._results: OrderedDict[str, ResultT] = OrderedDict()  # the least recently used first
        self._flights: dict[str, dict[str, _Flight[ResultT]]] = {}  # by key and label: whose results will be kept

    async def run(
        self,
        key: str,
        label: str,
        work: Callable[[], Awaitable[ResultT]],
        claim: Callable[[ResultT], None] = lambda result: None,
    ) -> ResultT:
        """Return the result of `key`, having `work` done if nobody has. Raises what work of this label raised.

        `claim` is called with the result before anything else happens to it: nothing runs between the end of the work
        and the claims of all who waited for it.
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
        """Keep a result that was come by otherwise; the least recently used ones give way.

        It is newer than what is under way: that goes to those who wait for it, and to nobody else.
        """
        self._flights.pop(key, None)
        self._results[key] = result
        self._results.move_to_end(key)
        while len(self._results) > self._max_results:
            self._results.popitem(last=False)

    def drop(self, is_stale: Callable[[ResultT], bool]) -> None:
        """Forget these results; what is under way is not affected."""
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
            flight.result.exception()  # seen: nobody may be waiting any more
        else:
            if self._flights.get(key, {}).get(label) is flight:
                self.put(key, result)
            for claim in flight.claims:
                claim(result)
            flight.result.set_result(result)
        finally:
            self._end(key, label, flight)
            flight.result.cancel()  # the end of this life; otherwise it is done

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

"""`FreeRuns`: free block ids as runs of consecutive ids, so that a sequence's blocks tend to be adjacent."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import pairwise

MAX_STALE = 4  # the heap is rebuilt when it has this many times more entries than there are runs


class FreeRuns:
    """A set of integers below `count`, which contains all of them at first. `take` and `give` cost O(log runs)."""

    def __init__(self, count: int) -> None:
        self._count = 0
        self._stop_by_start: dict[int, int] = {}
        self._start_by_stop: dict[int, int] = {}
        self._by_length: list[tuple[int, int]] = []  # heap of (-length, start), with stale entries of former runs
        if count:
            self._add(0, count)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return (i for start, stop in sorted(self._stop_by_start.items()) for i in range(start, stop))

    def take(self, count: int, after: int = -1) -> list[int]:
        """Remove and return `count` integers: those following `after` if they are free, else from the longest runs."""
        assert count <= self._count, f"{count} of {self._count} free blocks are asked for"
        taken = self._take_from(after + 1, after + 1, count) if after + 1 in self._stop_by_start and after >= 0 else []
        while len(taken) < count:
            start, stop = self._longest()
            # From the middle of the run, so that the owner of the blocks before it can grow.
            spare = max(0, stop - start - (count - len(taken)))
            taken += self._take_from(start, start + spare // 2, count - len(taken))
        return taken

    def give(self, value: int) -> None:
        """Put one integer back."""
        start, stop = value, value + 1
        if value in self._start_by_stop:
            start = self._start_by_stop[value]
            self._remove(start)
        if stop in self._stop_by_start:
            after, stop = stop, self._stop_by_start[stop]
            self._remove(after)
        self._add(start, stop)

    def check_integrity(self) -> None:
        """Assert that runs neither touch nor overlap and that the count is right."""
        runs = sorted(self._stop_by_start.items())
        assert all(start < stop for start, stop in runs), "a run is empty"
        assert all(a[1] < b[0] for a, b in pairwise(runs)), "two runs touch"
        assert self._start_by_stop == {stop: start for start, stop in runs}, "the two ends disagree"
        assert self._count == sum(stop - start for start, stop in runs), "the count is wrong"

    def _take_from(self, start: int, first: int, count: int) -> list[int]:
        stop = self._stop_by_start[start]
        last = min(stop, first + count)
        self._remove(start)
        if start < first:
            self._add(start, first)
        if last < stop:
            self._add(last, stop)
        return list(range(first, last))

    def _longest(self) -> tuple[int, int]:
        while True:
            length, start = self._by_length[0]
            stop = self._stop_by_start.get(start)
            if stop is not None and stop - start == -length:
                return start, stop
            heapq.heappop(self._by_length)

    def _add(self, start: int, stop: int) -> None:
        self._stop_by_start[start] = stop
        self._start_by_stop[stop] = start
        self._count += stop - start
        if len(self._by_length) > MAX_STALE * len(self._stop_by_start) + 64:
            self._by_length = [(a - b, a) for a, b in self._stop_by_start.items() if a != start]
            heapq.heapify(self._by_length)
        heapq.heappush(self._by_length, (start - stop, start))

    def _remove(self, start: int) -> None:
        stop = self._stop_by_start.pop(start)
        del self._start_by_stop[stop]
        self._count -= stop - start

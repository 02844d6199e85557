"""`Blame`: finds the sequence that makes the executor die.

A death counts against a sequence if it happened in a step with it, or while its adapter was being loaded, and the
sequence gained no token since the death before. After two such deaths it is a suspect. Suspects are tried in halves:
only the half on trial runs, until each of its sequences gained a token or is finished. If the executor dies, the halves
of that half are tried next. A suspect that is alone when the executor dies is the culprit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

MAX_DEATHS = 2


class Verdict(NamedTuple):
    """The conclusion from a death: the culprit, if found, and whether there are fewer suspects than before."""

    culprit: int | None = None
    is_narrower: bool = False


class Blame:
    """Suspects by sequence id. `trial` is the set of sequences that may run, None for all."""

    def __init__(self) -> None:
        self.trial: frozenset[int] | None = None
        self._num_deaths: dict[int, int] = {}  # since the sequence's last token
        self._uncleared: set[int] = set()  # members of the trial without a new token
        self._untried: list[set[int]] = []  # groups of suspects, next first

    @property
    def is_watching(self) -> bool:
        """Whether any sequence is suspected, so that `on_token` and `on_finished` matter."""
        return bool(self._num_deaths)

    def allows(self, sequence_id: int) -> bool:
        """Return whether the sequence may run now."""
        return self.trial is None or sequence_id in self.trial

    def on_token(self, sequence_id: int) -> None:
        """Clear a sequence that gained a token: it does not make the executor die."""
        if self._num_deaths.pop(sequence_id, 0) >= MAX_DEATHS:
            self._uncleared.discard(sequence_id)
            for group in self._untried:
                group.discard(sequence_id)
            self._try_next()

    def on_finished(self, sequence_id: int) -> None:
        """Clear a sequence that is finished."""
        self.on_token(sequence_id)

    def on_executor_lost(self, in_flight: Iterable[int]) -> Verdict:
        """Count the executor's death against the sequences in flight and choose the next trial."""
        dead = set(in_flight)
        for sequence_id in dead:
            self._num_deaths[sequence_id] = self._num_deaths.get(sequence_id, 0) + 1
        suspects = sorted(sequence_id for sequence_id in dead if self._num_deaths[sequence_id] >= MAX_DEATHS)
        survivors = self._uncleared - dead
        self._uncleared = set()
        if len(dead) == 1 and suspects:
            del self._num_deaths[suspects[0]]
            self._untried.insert(0, survivors)
            self._try_next()
            return Verdict(suspects[0], is_narrower=True)
        half = len(suspects) // 2
        self._untried[:0] = [set(suspects[:half]), set(suspects[half:]), survivors]
        self._try_next()
        return Verdict(None, is_narrower=bool(suspects))

    def _try_next(self) -> None:
        """Try the next group if the present one is cleared; end the trial if there is none."""
        if self._uncleared:
            return
        while self._untried and not self._untried[0]:
            del self._untried[0]
        self._uncleared = self._untried.pop(0) if self._untried else set()
        self.trial = frozenset(self._uncleared) or None

"""`PolicyAdapters`: the policy's side that deals with adapters: pins, loads and their outcomes."""

from __future__ import annotations

from collections.abc import Iterable

from descant.contract.version import AdapterVersion
from descant.scheduling.gate import AdapterGate
from descant.scheduling.placement.loads import AdapterLoad, AdapterWork
from descant.scheduling.sequence_states import SequenceStates
from descant_client.errors import DescantError


class PolicyAdapters:
    """Passes pins and the outcomes of loads to the adapter gate of the present executor, and keeps pins for the next.

    Outcomes of loads that an earlier executor was asked for are ignored.
    """

    def __init__(self, states: SequenceStates) -> None:
        self._states = states
        self.pins: tuple[AdapterVersion, ...] = ()
        """Versions that are to stay on the device, on every executor."""

    @property
    def unplaceable_pins(self) -> tuple[AdapterVersion, ...]:
        """Pins that can never have a place beside those before them; empty while the executor is down."""
        return self._states.life.gate.unplaceable_pins if self._states.life else ()

    def take_work(self) -> AdapterWork:
        """Return what the executor is to do now, each thing once. Nothing in flight uses the slots of its loads."""
        return self._states.life.gate.take_work() if self._states.life else AdapterWork()

    def set_pins(self, versions: Iterable[AdapterVersion]) -> None:
        """Keep these versions, and no others, on the device; also on executors to come."""
        self.pins = tuple(versions)
        if self._states.life is not None:
            self._states.life.gate.set_pins(self.pins)

    def forget_version(self, digest: str) -> None:
        """Free the version's place as soon as no sequence uses it."""
        if self._states.life is not None:
            self._states.life.gate.forget_version(digest)

    def on_prefetch_done(self, digest: str) -> None:
        """Mark the prefetch of `digest` as finished, whether it succeeded or not.

        The sequences that wait for the version are no longer suspected if the executor dies.
        """
        if self._states.life is not None:
            self._states.life.gate.on_prefetch_done(digest)

    def on_staged(self, load: AdapterLoad) -> None:
        """Record that the load's version is in host memory. Allows the next load to be read."""
        if (gate := self._gate_of(load)) is not None:
            gate.on_staged(load)

    def on_placed(self, load: AdapterLoad) -> None:
        """Record that the load is done. The sequences that waited for it may run."""
        if (gate := self._gate_of(load)) is not None:
            for sequence in gate.on_placed(load):
                self._states.lineup.fairness.enqueue(sequence)

    def on_load_failed(self, load: AdapterLoad, error: DescantError) -> None:
        """Fail the sequences that waited for the load with `error`. The next sequence with its version tries again.

        Not for loads that failed because the executor died: `Policy.on_executor_lost` covers those.
        """
        if (gate := self._gate_of(load)) is not None:
            for sequence in gate.on_load_failed(load):
                if not sequence.is_finished:  # with another choice of its request
                    self._states.finish(sequence, "error", error)

    def _gate_of(self, load: AdapterLoad) -> AdapterGate | None:
        """Return the gate that a load was decided by; None if its executor is gone."""
        life = self._states.life
        return life.gate if life is not None and life.epoch == load.epoch else None

"""When a request got what, and what guessing saved it: `Timings`, a part of `protocol.Done`."""

from __future__ import annotations

from descant_client.wire import Wire


class Timings(Wire, frozen=True):
    """Seconds, measured at the server: until first scheduled, until the first token, until the end."""

    queue_s: float
    ttft_s: float
    e2e_s: float
    num_preemptions: int = 0
    is_cold: bool = False  # it had to wait for its adapter to come to the device
    num_drafts: int = 0  # steps that verified a guess
    num_drafted: int = 0  # tokens guessed in them, one after the other
    num_accepted: int = 0  # of these came true: so many steps were saved

    @property
    def acceptance_rate(self) -> float | None:
        """The share of guessed tokens that came true; None: none were guessed."""
        return self.num_accepted / self.num_drafted if self.num_drafted else None

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens that came true per verified guess; None: none was."""
        return self.num_accepted / self.num_drafts if self.num_drafts else None

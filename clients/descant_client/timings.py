"""The times of a request and its counts of speculation: `Timings`, a part of `protocol.Done`."""

from __future__ import annotations

from descant_client.wire import Wire


class Timings(Wire, frozen=True):
    """Times in seconds from the arrival of a request, measured at the server, and counts.

    `queue_s` is until first scheduled, `ttft_s` until the first token, `e2e_s` until the end.
    """

    queue_s: float
    ttft_s: float
    e2e_s: float
    num_preemptions: int = 0
    is_cold: bool = False  # whether it waited for its adapter to be placed on the device
    num_drafts: int = 0  # steps that verified a draft
    num_drafted: int = 0  # tokens on the longest path of each of these drafts
    num_accepted: int = 0  # drafted tokens that were accepted: the number of steps saved

    @property
    def acceptance_rate(self) -> float | None:
        """Share of drafted tokens that were accepted; None if none were drafted."""
        return self.num_accepted / self.num_drafted if self.num_drafted else None

    @property
    def mean_accepted_length(self) -> float | None:
        """Number of accepted tokens per verified draft; None if none was verified."""
        return self.num_accepted / self.num_drafts if self.num_drafts else None

"""`DefaultHeads`: the draft heads that the configuration names for requests for the base alone.

They are there for speed only. So whatever becomes of their adapter, such requests go on without it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from descant.catalog.entry import SHARED
from descant.contract.principal import Principal
from descant.messages import ResolveAdapters
from descant.sessions.leases import Lease
from descant_client.errors import DescantError
from descant_client.speculation import SpeculationChoice, named_heads

logger = logging.getLogger(__name__)

RETRY_S = 60.0  # after a failure; until then nobody asks for them, and nobody waits


class DefaultHeads:
    """Which they are, and whether to ask the registry for them."""

    def __init__(self, speculation: SpeculationChoice, now: Callable[[], float] = time.monotonic) -> None:
        self._name = named_heads(speculation)
        self._now = now
        self._retry_at_s = 0.0

    @property
    def are_there(self) -> bool:
        """Whether any are named, and were not found wanting just now."""
        return self._name is not None and self._now() >= self._retry_at_s

    def question(self, lease: Lease) -> ResolveAdapters:
        """Return what to ask, if there are any. The name is the shared one, whoever's request it is."""
        return ResolveAdapters((), Principal(SHARED), lease, heads=self._name)

    def failed(self, error: DescantError) -> None:
        """The question was answered with an error."""
        if self._now() < self._retry_at_s:
            return  # several had asked
        self._retry_at_s = self._now() + RETRY_S
        logger.warning("requests for the base go without the draft heads of %r: %s", self._name, error)

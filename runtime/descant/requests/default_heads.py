"""`DefaultHeads`: the draft heads that the configuration names for requests for the base alone.

They only make answers faster. If their adapter cannot be resolved, such requests run without draft heads.
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

RETRY_S = 60.0  # time after a failure in which the registry is not asked again


class DefaultHeads:
    """The configured heads, and whether to ask the registry for them now."""

    def __init__(self, speculation: SpeculationChoice, now: Callable[[], float] = time.monotonic) -> None:
        self._name = named_heads(speculation)
        self._now = now
        self._retry_at_s = 0.0

    @property
    def is_available(self) -> bool:
        """Whether heads are configured and the last recorded failure is at least `RETRY_S` ago."""
        return self._name is not None and self._now() >= self._retry_at_s

    def question(self, lease: Lease) -> ResolveAdapters:
        """Return the question to the registry. The name is the shared one for every principal."""
        return ResolveAdapters((), Principal(SHARED), lease, heads=self._name)

    def on_failed(self, error: DescantError) -> None:
        """Record that the heads could not be resolved. Further failures within `RETRY_S` are not logged."""
        if self._now() < self._retry_at_s:
            return  # another request has reported it
        self._retry_at_s = self._now() + RETRY_S
        logger.warning("requests for the base go without the draft heads of %r: %s", self._name, error)

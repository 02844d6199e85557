"""`Dialer`: opens the first socket of a session, and another whenever one is lost."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable

import anyio
from websockets.asyncio.client import ClientConnection

from descant_client.errors import ConnectionLost, DescantError, Unauthorized
from descant_client.handshake import endpoint, shake_hands
from descant_client.protocol import Hello, encoder_for

_STABLE_S = 5.0  # a link that lasts this long, or carries an answer, ends an outage


class Backoff:
    """Delays between attempts to connect: doubling from `first_s` to `max_s`, each shortened by up to half at random.

    The clock, the sleep and the random generator are parameters, so that tests run without real time.
    """

    def __init__(
        self,
        first_s: float = 0.1,
        max_s: float = 5.0,
        *,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        self.clock = clock
        self.sleep = sleep
        self._first_s = first_s
        self._max_s = max_s
        self._rng = rng or random.Random()

    def delay_s(self, attempt: int) -> float:
        """Return the delay before attempt number `attempt`, counted from 0."""
        longest_s = min(self._max_s, self._first_s * 2.0 ** min(attempt, 32))
        return longest_s * (1.0 - 0.5 * self._rng.random())


class Link:
    """One socket of a session, with the server's hello and the encoding agreed on it."""

    def __init__(self, websocket: ClientConnection, hello: Hello, opened_s: float) -> None:
        self.websocket = websocket
        self.hello = hello
        self.encode = encoder_for(str(websocket.subprotocol))
        self.opened_s = opened_s  # by the clock of the backoff
        self.has_progressed = False  # it has carried more than the hello


class Dialer:
    """Opens links to one server, and gives up when an outage has lasted `patience_s`.

    An outage ends when a link has carried an answer or has lasted 5 s. Links lost before that belong to the same
    outage: its delays keep growing and its patience is not renewed.
    """

    def __init__(
        self, uri: str, token: str | None, subprotocols: tuple[str, ...], patience_s: float, backoff: Backoff
    ) -> None:
        self.uri = endpoint(uri)
        self._token = token
        self._subprotocols = subprotocols
        self._patience_s = patience_s
        self._backoff = backoff
        self._outage_began_s = 0.0
        self._num_attempts = 0  # in this outage

    async def open(self) -> Link:
        """Open the first link of a session, in one attempt. Raises as `shake_hands`."""
        link = await self._dial(session=None)
        self._outage_began_s = link.opened_s
        return link

    async def reopen(self, lost: Link, reason: str) -> Link:
        """Open the link that replaces a lost one. `reason` says why that one was lost.

        Raises:
            ConnectionLost: the outage has lasted `patience_s`; it names the reason of the last failure.
            Unauthorized: the server no longer accepts the token.
        """
        now_s = self._backoff.clock()
        if lost.has_progressed or now_s - lost.opened_s >= _STABLE_S:
            self._outage_began_s, self._num_attempts = now_s, 0
        while True:
            left_s = self._outage_began_s + self._patience_s - self._backoff.clock()
            if left_s <= 0:
                raise ConnectionLost(self.uri, f"{reason} Gave up after {self._patience_s:g} s.")
            await self._backoff.sleep(min(self._backoff.delay_s(self._num_attempts), left_s))
            self._num_attempts += 1
            try:
                return await self._dial(lost.hello.session)
            except Unauthorized:
                raise
            except ConnectionLost as exc:
                reason = exc.reason
            except DescantError as exc:
                reason = str(exc)

    async def _dial(self, session: str | None) -> Link:
        websocket, hello = await shake_hands(
            self.uri, token=self._token, subprotocols=self._subprotocols, session=session
        )
        return Link(websocket, hello, self._backoff.clock())

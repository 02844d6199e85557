"""The auth actor: API keys to principals.

Accepts: Authenticate. Asks: no actor. Owns: the hashed keys of the configuration.
"""

from __future__ import annotations

from descant.actor.actor import Actor
from descant.config import Config, hash_key
from descant.contract.principal import Principal
from descant.messages import Authenticate, AuthMessage
from descant_client.errors import Unauthorized

LOCAL = "local"  # the principal of a server without keys


class Auth(Actor[AuthMessage]):
    """Authenticates clients by API key. Without configured keys every client is the local principal."""

    def __init__(self, config: Config) -> None:
        roots = config.adapters.roots
        self._local = Principal(LOCAL, None if roots is None else tuple(roots), is_admin=True)
        self._by_hash = {  # by hash, so that the time of a look-up reveals nothing about other keys
            key.sha256: Principal(key.name, (*key.roots, *(roots or ())), key.is_admin, key.weight, key.max_queued)
            for key in config.keys
        }

    async def on_receive(self, message: AuthMessage) -> Principal:
        """Answer one message."""
        match message:
            case Authenticate(key):
                return self._authenticate(key)

    def _authenticate(self, key: str | None) -> Principal:
        if not self._by_hash:
            return self._local
        if not key:
            raise Unauthorized("This server asks for an API key.")
        principal = self._by_hash.get(hash_key(key))
        if principal is None:
            raise Unauthorized("This API key is not known here.")
        return principal

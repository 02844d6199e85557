"""The fetch actor: finds the files of models and adapters, and downloads them.

Accepts: FetchAdapter, FetchModel. Asks: no actor. Owns: downloads in flight.
"""

from __future__ import annotations

from pathlib import Path

import anyio.to_thread

from descant.actor.actor import Actor, Later
from descant.messages import FetchAdapter, FetchMessage, FetchModel
from descant.sources.hub import download_model
from descant.sources.local import find_adapter
from descant_client.errors import ModelInvalid


class Fetch(Actor[FetchMessage]):
    """Finds files. Blocking work runs in threads, so that a slow source delays no other request."""

    async def on_receive(self, message: FetchMessage) -> Later:
        """Answer one message."""
        match message:
            case FetchAdapter():
                return self.later(self._fetch_adapter(message))
            case FetchModel():
                return self.later(self._fetch_model(message))

    async def _fetch_adapter(self, message: FetchAdapter) -> Path:
        return await anyio.to_thread.run_sync(find_adapter, message.adapter, message.path, message.roots)

    async def _fetch_model(self, message: FetchModel) -> Path:
        return await anyio.to_thread.run_sync(_find_model, message, abandon_on_cancel=True)  # it may take hours


def _find_model(message: FetchModel) -> Path:
    directory = Path(message.model).expanduser()
    if directory.is_dir():
        return directory.resolve()
    if message.model.startswith(("/", "./", "../", "~")):
        raise ModelInvalid(message.model, "there is no such directory.")
    return download_model(message.model, message.revision)

"""Client of a Descant server: asyncio, typed messages, no torch.

The names below are imported on first use, so that code that needs only `errors` or `protocol` (the server and its
child processes) loads neither sockets nor an event loop.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from descant_client import errors, protocol
    from descant_client.adapters import Adapter
    from descant_client.client import Client, connect
    from descant_client.lifecycle import Combination
    from descant_client.speculation import Speculation
    from descant_client.stream import Choice, Result, Stream

__all__ = [
    "Adapter",
    "Choice",
    "Client",
    "Combination",
    "Result",
    "Speculation",
    "Stream",
    "connect",
    "errors",
    "protocol",
]

_MODULE_OF_NAME = {
    "Adapter": "adapters",
    "Choice": "stream",
    "Client": "client",
    "Combination": "lifecycle",
    "Result": "stream",
    "Speculation": "speculation",
    "Stream": "stream",
    "connect": "client",
}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF_NAME:
        return getattr(import_module(f"{__name__}.{_MODULE_OF_NAME[name]}"), name)
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""`descant.local()`: a server inside one program, and a client of it."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from descant.assembly.system import running
from descant.config import AdapterConfig, AdapterEntry, Config, ModelConfig, ServerConfig
from descant.contract.engine import Dtype
from descant_client.client import Client, connect


@asynccontextmanager
async def local(
    model: str | None = None, *, adapters: Mapping[str, str] | None = None, dtype: Dtype | None = None
) -> AsyncIterator[Client]:
    """Serve `model` (a directory or Hub id; None: the demo model) to this program alone and yield a client.

    `adapters` maps names to references. The server runs in this event loop and in child processes: executor, worker,
    and their launcher where processes can fork. It listens on a free loopback port and ends with the block. Its data
    are deleted.

    Raises:
        ModelInvalid, SourceUnavailable: the model cannot be served.
        ConfigInvalid: a name or a reference in `adapters` is invalid.
    """
    entries = [AdapterEntry(name=name, ref=ref) for name, ref in (adapters or {}).items()]
    with tempfile.TemporaryDirectory(prefix="descant-") as data_dir:
        config = Config(
            data_dir=data_dir,
            server=ServerConfig(port=0),
            model=ModelConfig(path=model, dtype=dtype),
            adapters=AdapterConfig(entries=entries),
        )
        async with running(config) as system:
            await system.ready()
            async with connect(f"ws://127.0.0.1:{system.port}") as client:
                yield client

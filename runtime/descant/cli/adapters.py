"""`descant adapter …`: commands that list and change the adapters of a running server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, get_args

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from descant.cli.options import WeightedName, asyncly, connection_options
from descant_client.adapters import Adapter
from descant_client.client import connect
from descant_client.errors import AdapterNotFound
from descant_client.lifecycle import CombinationType
from descant_client.terminal import printable
from descant_client.wire import AdapterSource

_SHARED = click.option("--shared", is_flag=True, help="For every principal to use; administrators only.")
_SOURCE = click.option(
    "--source", type=click.Choice(get_args(AdapterSource)), help="Kind of the references; default: by their form."
)


@click.group()
def adapter() -> None:
    """List and change the adapters of a running server."""


@adapter.command("list")
@connection_options
@asyncly
async def list_adapters(uri: str, token: str | None) -> None:
    """List the adapters you may use, in order of registration."""
    async with connect(uri, token) as client:
        adapters = await client.adapters.list()
    table = Table("name", "source", "rank", "bytes", "version", "marks")
    for entry in adapters:
        cells = (entry.name, entry.source, entry.rank, entry.num_bytes, _version(entry), _marks(entry))
        table.add_row(*(Text("" if cell is None else printable(str(cell))) for cell in cells))
    Console().print(table)


@adapter.command("create")
@click.argument("name")
@click.option("--rank", type=int, default=8, show_default=True)
@click.option("--alpha", type=float, help="Default: the rank, for a scaling of 1.")
@click.option("--target", "targets", multiple=True, metavar="MODULE", help="Repeatable; default: q_proj and v_proj.")
@_SHARED
@connection_options
@asyncly
async def create(uri: str, token: str | None, name: str, targets: tuple[str, ...], **options: Any) -> None:
    """Create the adapter NAME, which changes nothing until `load` or `merge` puts content under the name."""
    async with connect(uri, token) as client:
        _print_entry(await client.adapters.create(name, target_modules=targets or None, **options))


@adapter.command("load")
@click.argument("name")
@click.argument("ref")
@_SOURCE
@_SHARED
@connection_options
@asyncly
async def load(uri: str, token: str | None, name: str, ref: str, **options: Any) -> None:
    """Load REF under NAME. Running requests finish on the previous version."""
    async with connect(uri, token) as client:
        _print_entry(await client.adapters.load(name, ref, **options))


@adapter.command("merge")
@click.argument("name")
@click.argument("members", nargs=-1, required=True, type=WeightedName())
@click.option("--type", type=click.Choice(get_args(CombinationType)), default="cat", show_default=True)
@click.option("--rank", type=int, help="Of the result, for the svd types; default: the largest of the members'.")
@click.option("--clamp", type=float, help="For the svd types: the quantile that values are clamped to.")
@click.option("--density", type=float, help="For ties, dare and magnitude_prune: the share of values kept.")
@click.option("--sign", "majority_sign_method", type=click.Choice(["total", "frequency"]), default="total")
@click.option("--seed", type=int, default=0, help="Of the random choice of the values that dare drops.")
@_SOURCE
@_SHARED
@connection_options
@asyncly
async def merge(uri: str, token: str | None, name: str, members: tuple[tuple[str, float], ...], **options: Any) -> None:
    """Put a combination of adapters, each with a weight (default 1), under NAME."""
    async with connect(uri, token) as client:
        _print_entry(await client.adapters.merge(name, members, **options))


@adapter.command("fork")
@click.argument("name")
@click.argument("new_name")
@_SHARED
@connection_options
@asyncly
async def fork(uri: str, token: str | None, name: str, new_name: str, shared: bool) -> None:
    """Give the version under NAME a second name, NEW_NAME."""
    async with _opened(uri, token, name) as entry:
        _print_entry(await entry.fork(new_name, shared=shared))


@adapter.command("save")
@click.argument("name")
@click.argument("directory")
@connection_options
@asyncly
async def save(uri: str, token: str | None, name: str, directory: str) -> None:
    """Write NAME as a directory that PEFT reads, on the server's machine."""
    async with _opened(uri, token, name) as entry:
        _print_entry(await entry.save(directory))


@adapter.command("merge-and-save")
@click.argument("name")
@click.argument("directory")
@connection_options
@asyncly
async def merge_and_save(uri: str, token: str | None, name: str, directory: str) -> None:
    """Write the base model with NAME merged into it as a checkpoint, on the server's machine."""
    async with _opened(uri, token, name) as entry:
        _print_entry(await entry.merge_and_save(directory))


@adapter.command("destroy")
@click.argument("name")
@connection_options
@asyncly
async def destroy(uri: str, token: str | None, name: str) -> None:
    """Remove NAME. Running requests finish."""
    async with _opened(uri, token, name) as entry:
        await entry.destroy()
    click.echo(f"{printable(name)} is gone")


async def _set_flag(change: Callable[[Adapter], Any], uri: str, token: str | None, name: str) -> None:
    async with _opened(uri, token, name) as entry:
        _print_entry(await change(entry))


for _change, _help in (
    (Adapter.pin, "Load NAME onto the device and keep it there."),
    (Adapter.unpin, "Allow the eviction of NAME from the device."),
    (Adapter.enable, "Apply NAME again in new requests for it."),
    (Adapter.disable, "Answer new requests for NAME with the base model."),
):
    _command = click.argument("name")(connection_options(asyncly(partial(_set_flag, _change))))
    adapter.command(_change.__name__, help=_help)(_command)


@asynccontextmanager
async def _opened(uri: str, token: str | None, name: str) -> AsyncIterator[Adapter]:
    async with connect(uri, token) as client:
        entry = await client.adapters.open(name)
        if entry is None:
            raise AdapterNotFound(name)
        yield entry


def _print_entry(entry: Adapter) -> None:
    rank = None if entry.rank is None else f"rank {entry.rank}"
    num_bytes = None if entry.num_bytes is None else f"{entry.num_bytes:,} bytes"
    version = _version(entry) or "not read yet"
    parts = [entry.name, version, rank, num_bytes, _marks(entry) or None]
    click.echo(" · ".join(printable(part) for part in parts if part is not None))


def _version(entry: Adapter) -> str | None:
    return entry.digest and entry.digest[:12]


def _marks(entry: Adapter) -> str:
    pinned = "pinned (no room)" if entry.is_unplaceable else "pinned"
    marks = {"shared": entry.is_shared, pinned: entry.is_pinned, "disabled": not entry.is_enabled}
    return ", ".join(mark for mark, is_set in marks.items() if is_set)

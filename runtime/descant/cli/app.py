"""The command line: `descant serve | chat | generate | adapter … | loadtest | demo | key | doctor`.

Groups of commands in files of their own, such as `cli.adapters`, are added at the end. Importing this module needs
no torch and, of the server's other dependencies, only platformdirs (in `config`); a command imports its own.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console

from descant.__about__ import __version__
from descant.cli.adapters import adapter
from descant.cli.loadtest import loadtest
from descant.cli.options import WeightedName, asyncly, connection_options
from descant.config import AdapterEntry, Config, hash_key, load_config
from descant_client.client import connect
from descant_client.errors import ConfigInvalid, DescantError
from descant_client.terminal import chat as converse
from descant_client.terminal import print_stream

INTERRUPTED = 130


def main() -> None:
    """Run the command line. A DescantError is printed as one sentence, with exit status 1."""
    try:
        cli(prog_name="descant", standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except DescantError as exc:
        Console(stderr=True).print(f"[bold red]{exc.code}[/] ", end="")
        Console(stderr=True).print(str(exc), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


@click.group()
@click.version_option(__version__)
def cli() -> None:
    """One base language model, any number of LoRA voices, streamed over WebSocket."""


def _sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        [
            click.option("--adapter", help="Name or path of the adapter; none: the base model."),
            click.option("--max-tokens", type=int, help="Default: as many as the context holds."),
            click.option("--temperature", type=float, default=1.0, show_default=True, help="0: the likeliest token."),
            click.option("--seed", type=int, help="Default: the server draws one."),
        ]
    ):
        function = option(function)
    return function


# ---- server --------------------------------------------------------------------------------------


@cli.command()
@click.argument("model", required=False)
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=REF", help="Register an adapter; repeatable.")
@click.option("--host", help="Default: 127.0.0.1; other addresses need API keys.")
@click.option("--port", type=click.IntRange(0, 65535), help="Default: 8080; 0 takes a free one.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Default: the checkpoint's.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where prepared adapters are kept.")
@click.option("--engine", type=click.Choice(["model", "dummy"]), help="dummy: no model, words at a set pace.")
@click.option("--config", "config_file", type=click.Path(path_type=Path, dir_okay=False), help="A TOML file.")
def serve(model: str | None, adapters: tuple[str, ...], config_file: Path | None, **options: Any) -> None:
    """Serve MODEL, a directory or a Hub id; without one, the embedded demo model and its adapters."""
    from descant.cli.serve import serve_forever

    config = load_config(config_file) if config_file else Config()
    serve_forever(_override(config, model, adapters, options))


def _override(config: Config, model: str | None, adapters: tuple[str, ...], options: dict[str, Any]) -> Config:
    given = {name: value for name, value in options.items() if value is not None}
    server = {name: given[name] for name in ("host", "port") if name in given}
    base = {name: given[name] for name in ("dtype", "engine") if name in given}
    if model is not None:
        base["path"] = model
    entries = [*config.adapters.entries, *[_adapter_entry(text) for text in adapters]]
    replace = msgspec.structs.replace
    config = replace(
        config,
        server=replace(config.server, **server),
        model=replace(config.model, **base),
        adapters=replace(config.adapters, entries=entries),
    )
    return replace(config, data_dir=str(given["data_dir"])) if "data_dir" in given else config


def _adapter_entry(text: str) -> AdapterEntry:
    name, equals, ref = text.partition("=")
    if not equals or not name or not ref:
        raise ConfigInvalid("--adapter", f"{text!r} is not NAME=REF, such as upper=./adapters/upper.")
    return AdapterEntry(name=name, ref=ref)


@cli.command()
@click.argument("name")
def key(name: str) -> None:
    """Make an API key for NAME and show the lines for the configuration file."""
    api_key = "dsc_" + secrets.token_urlsafe(32)
    click.echo(f"# The key of {name}, shown this once: {api_key}")
    click.echo(f'[[keys]]\nname = {json.dumps(name)}\nsha256 = "{hash_key(api_key)}"')


@cli.command()
def doctor() -> None:
    """Check this machine: versions, devices, and whether results are independent of batching, bit for bit."""
    from descant.cli.doctor import examine

    if not examine(Console()):
        sys.exit(1)


@cli.command()
@click.option("--prompt", default=None, help="What every voice is given.")
@asyncly
async def demo(prompt: str | None) -> None:
    """Stream one prompt through every demo voice, kill the executor in the middle, then chat."""
    from descant.cli.demo import show

    if not await show(Console(), prompt):
        sys.exit(1)


# ---- clients -------------------------------------------------------------------------------------


@cli.command()
@connection_options
@_sampling_options
@click.option("--plain", "is_plain", is_flag=True, help="Send each line as a prompt of its own.")
@asyncly
async def chat(uri: str, token: str | None, adapter: str | None, is_plain: bool, **options: Any) -> None:
    """Talk to a running server."""
    async with connect(uri, token) as client:
        await converse(client, adapter, console=Console(), is_plain=is_plain, **options)


@cli.command()
@click.argument("prompt")
@connection_options
@_sampling_options
@click.option("--show-speculation", "shows_speculation", is_flag=True, help="Color the tokens that were guessed ahead.")
@click.option(
    "--blend", multiple=True, type=WeightedName(), help="In place of --adapter: a member of a weighted sum; repeatable."
)
@asyncly
async def generate(
    prompt: str,
    uri: str,
    token: str | None,
    blend: tuple[tuple[str, float], ...],
    shows_speculation: bool,
    **options: Any,
) -> None:
    """Stream the answer to PROMPT. - reads the prompt from standard input."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if shows_speculation:
        options |= {"mark_guessed": True, "logprobs": 0}
    async with connect(uri, token) as client:
        stream = client.generate(text, adapters=blend or None, **options)
        await print_stream(stream, Console(), shows_speculation=shows_speculation)


cli.add_command(adapter)
cli.add_command(loadtest)

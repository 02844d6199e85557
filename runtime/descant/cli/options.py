"""Decorators and parameter types shared by commands: an event loop, connection options, weighted names."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

import anyio
import click

DEFAULT_URI = "ws://127.0.0.1:8080"


def asyncly(function: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a command's coroutine in an event loop of its own."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        anyio.run(lambda: function(*args, **kwargs))

    return run


def connection_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options `--url` and `--token` to a command, as arguments `uri` and `token`."""
    function = click.option("--token", envvar="DESCANT_API_KEY", help="The API key, if the server asks for one.")(
        function
    )
    return click.option("--url", "uri", default=DEFAULT_URI, show_default=True, help="The server.")(function)


class WeightedName(click.ParamType[tuple[str, float]]):
    """A parameter `NAME=W`, or `NAME` for a weight of 1. The weight follows the last `=`."""

    name = "NAME[=W]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """Return the name and the weight."""
        name, _, weight = value.rpartition("=") if "=" in value else (value, "=", "1")
        try:
            number = float(weight)
        except ValueError:
            name, number = "", 0.0
        return (name, number) if name else self.fail(f"{value!r} is not {self.name}, such as upper=0.5.", param, ctx)

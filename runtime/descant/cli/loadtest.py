"""`descant loadtest`: turns options into a plan, runs it, and prints the report or writes it to a file."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import click
import msgspec
from rich.console import Console

from descant.cli.options import DEFAULT_URI
from descant_client.client import Client, connect
from descant_client.errors import ConfigInvalid
from descant_client.loadtest.arrivals import Arrivals, Closed, arrivals_of
from descant_client.loadtest.lengths import parse_lengths
from descant_client.loadtest.plan import Plan, check_plan
from descant_client.loadtest.popularity import Distinct, PowerLaw, matching
from descant_client.loadtest.record import Tally
from descant_client.loadtest.report import Report, encode_report
from descant_client.loadtest.runner import run
from descant_client.loadtest.view import print_report, showing
from descant_client.terminal import on_interrupt

DEFAULT_NUM_REQUESTS = 100

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_LENGTHS = "N, uniform:LOW:HIGH or lognormal:MEDIAN,SIGMA[,MAX]"


@click.command()
@click.option("--url", "uri", default=DEFAULT_URI, show_default=True, help="The server.")
@click.option("--token", "tokens", multiple=True, envvar="DESCANT_API_KEY", help="An API key; several share the load.")
@click.option("--rate", type=float, help="Requests per second, or inf: all at once.  [default: 8]")
@click.option("--cv", type=float, help="Of the gaps: 1 Poisson, 0 steady, 4 bursty.  [default: 1]")
@click.option("--concurrency", type=int, help="Instead of a rate: so many requests in flight, always.")
@click.option("--requests", type=int, help=f"How many.  [default: {DEFAULT_NUM_REQUESTS}, unless --duration]")
@click.option("--duration", type=float, help="Seconds after which nothing is sent any more.")
@click.option("--warmup", default="0", show_default=True, help="Not measured: first requests (20) or seconds (5s).")
@click.option("--adapter", "adapters", multiple=True, help="Use this adapter; repeatable.  [default: all there are]")
@click.option("--adapters-from", type=_FILE, help="Use the adapters in this file, one per line.")
@click.option("--adapter-pattern", help="Use the server's adapters that this fits, such as 'demo-*'.")
@click.option("--alpha", type=float, default=1.0, show_default=True, help="P(first k of n) = (k/n)^alpha; 1: uniform.")
@click.option("--distinct", "is_distinct", is_flag=True, help="Use the adapters in turn.")
@click.option("--base-share", type=float, default=0.0, show_default=True, help="Share of requests without adapter.")
@click.option("--prompt-tokens", default="uniform:8:64", show_default=True, help=_LENGTHS)
@click.option("--prompts-from", type=_FILE, help="Prompts in turn, one per line, instead of random tokens.")
@click.option("--output-tokens", default="lognormal:32,0.5,512", show_default=True, help=_LENGTHS)
@click.option("--temperature", type=float, default=1.0, show_default=True, help="0: the likeliest token.")
@click.option("--connections", type=click.IntRange(1), default=1, show_default=True, help="WebSockets per key.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the whole workload.")
@click.option("--slo-ttft", type=float, help="Seconds to the first token that a good request may take.")
@click.option("--slo-tpot", type=float, help="Seconds per token after it that a good request may take.")
@click.option("--out", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Write the result as JSON.")
@click.option("--records", "with_records", is_flag=True, help="With every request in it.")
def loadtest(
    uri: str,
    tokens: tuple[str, ...],
    connections: int,
    adapters: tuple[str, ...],
    adapters_from: Path | None,
    adapter_pattern: str | None,
    out: Path | None,
    with_records: bool,
    **parameters: Any,
) -> None:
    """Send requests on a schedule drawn from a seed, independent of the answers, and report latencies and throughput.

    Ctrl-C ends the test early and reports the requests until then, with exit status 130.
    """
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigInvalid("out", f"there is no directory {out.absolute().parent}.")
    names = [*adapters, *(_lines(adapters_from) if adapters_from else [])]
    plan = _plan(num_keys=max(1, len(tokens)), **parameters)
    check_plan(plan)
    report = anyio.run(_carry_out, uri, tokens or (None,), connections, plan, names, adapter_pattern)
    print_report(report, Console())
    if out is not None:
        out.write_bytes(encode_report(report, with_records=with_records))
    if not report.is_complete:
        raise click.Abort  # the command line's exit status 130


async def _carry_out(
    uri: str, tokens: Sequence[str | None], num_connections: int, plan: Plan, names: list[str], pattern: str | None
) -> Report:
    async with _clients(uri, tokens, num_connections) as clients:
        if plan.base_share < 1:
            plan = msgspec.structs.replace(plan, adapters=await _adapters(clients[: len(tokens)], names, pattern))
        tally, stop = Tally(), anyio.Event()
        async with showing(tally, Console(stderr=True)):
            with on_interrupt(stop.set):
                return await run(clients, plan, tally=tally, stop=stop)


@asynccontextmanager
async def _clients(uri: str, tokens: Sequence[str | None], num_connections: int) -> AsyncIterator[list[Client]]:
    """Open connections, with the keys in turn: connection i uses key i % number of keys."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(connect(uri, token)) for token in [*tokens] * num_connections]


async def _adapters(clients: Sequence[Client], names: list[str], pattern: str | None) -> list[str]:
    """Return the given names and the server's names that match the pattern; without either, all of the server's.

    Only the server's names that every key sees count. `clients` has one client for each key.
    """
    if names and pattern is None:
        return names
    seen = [[adapter.name for adapter in await client.adapters.list()] for client in clients]
    known = [name for name in seen[0] if all(name in others for others in seen[1:])]
    if not known and pattern is None and any(seen):
        raise ConfigInvalid("adapter", "the keys see no adapter in common; give some, or --base-share 1.")
    return known if pattern is None else [*names, *matching(known, pattern)]


def _plan(
    *,
    num_keys: int,
    requests: int | None,
    duration: float | None,
    warmup: str,
    alpha: float,
    is_distinct: bool,
    prompt_tokens: str,
    prompts_from: Path | None,
    output_tokens: str,
    slo_ttft: float | None,
    slo_tpot: float | None,
    **parameters: Any,
) -> Plan:
    arrivals = _arrivals(parameters.pop("rate"), parameters.pop("cv"), parameters.pop("concurrency"))
    warmup_requests, warmup_s = _warmup(warmup)
    return Plan(
        arrivals=arrivals,
        num_requests=DEFAULT_NUM_REQUESTS if requests is None and duration is None else requests,
        duration_s=duration,
        warmup_requests=warmup_requests,
        warmup_s=warmup_s,
        popularity=Distinct() if is_distinct else PowerLaw(alpha),
        prompt_tokens=parse_lengths(prompt_tokens, "prompt-tokens"),
        prompts=_lines(prompts_from) if prompts_from else [],
        output_tokens=parse_lengths(output_tokens, "output-tokens"),
        num_keys=num_keys,
        slo_ttft_s=slo_ttft,
        slo_tpot_s=slo_tpot,
        **parameters,
    )


def _arrivals(rate: float | None, cv: float | None, concurrency: int | None) -> Arrivals:
    if concurrency is not None and rate is not None:
        raise ConfigInvalid("concurrency", "give either a rate (open loop) or a concurrency (closed loop).")
    if cv is not None and (concurrency is not None or rate == math.inf):
        raise ConfigInvalid("cv", "there are gaps only with a finite rate.")
    if concurrency is not None:
        return Closed(concurrency)
    return arrivals_of(8.0 if rate is None else rate, 1.0 if cv is None else cv)


def _warmup(text: str) -> tuple[int, float]:
    """Return the requests and the seconds of a warm-up, one of them 0."""
    try:
        return (0, float(text[:-1])) if text.endswith("s") else (int(text), 0.0)
    except ValueError:
        raise ConfigInvalid("warmup", f"{text!r} is neither a number of requests (20) nor of seconds (5s).") from None


def _lines(path: Path) -> list[str]:
    """Return the lines of a file that are not blank, stripped."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigInvalid(str(path), str(exc)) from exc
    kept = [line for line in lines if line]
    if not kept:
        raise ConfigInvalid(str(path), "it has no lines.")
    return kept

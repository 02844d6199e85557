"""Requests that guess ahead, on the demo model: what clients may ask for, and that they get the same tokens faster."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import anyio
import msgspec
import pytest
from anyio import to_thread
from rich.console import Console

from descant.assembly.registry_setup import registry_config
from descant.assembly.system import System
from descant.config import AdapterConfig, Config, ModelConfig, SchedulingConfig, ServerConfig, check_config
from descant.requests.default_heads import DefaultHeads
from descant.sessions.leases import Lease
from descant.sources.demo import DEMO_ADAPTERS
from descant_client import connect
from descant_client.client import Client
from descant_client.errors import AdapterInvalid, AdapterNotFound, ConfigInvalid, InvalidRequest
from descant_client.speculation import Speculation, SpeculationChoice
from descant_client.terminal import print_stream
from servers import kill_executor, results, serve

pytestmark = pytest.mark.anyio

TEXT = "sing la la la and then sing la la la"
EAGER = Speculation(always=True)


def config(directory: Path, speculation: SpeculationChoice = "auto") -> Config:
    """A server of the demo model."""
    return Config(
        data_dir=str(directory), server=ServerConfig(port=0), scheduling=SchedulingConfig(speculation=speculation)
    )


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[System, str]]:
    async with serve(config(tmp_path_factory.mktemp("data"))) as running:
        yield running


@pytest.fixture(scope="module")
async def eager_uri(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """A server that guesses always, with fewer heads than the demo's."""
    eager = config(tmp_path_factory.mktemp("eager"), EAGER)
    async with serve(msgspec.structs.replace(eager, adapters=AdapterConfig(max_draft_heads=3))) as (_, uri):
        yield uri


@pytest.fixture(scope="module")
async def named(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[System, str]]:
    """A server that names heads for the base."""
    async with serve(config(tmp_path_factory.mktemp("named"), NAMED)) as running:
        yield running


@pytest.fixture(scope="module")
async def client(server: tuple[System, str]) -> AsyncIterator[Client]:
    async with connect(server[1]) as client:
        yield client


def ask(client: Client, speculation: SpeculationChoice | None, **options: Any) -> Any:
    return client.generate(TEXT, **{"temperature": 0.0, "speculation": speculation, **options})


async def test_guesses_change_no_token_and_say_what_they_saved(client: Client) -> None:
    plain, eager = await results([ask(client, "off"), ask(client, EAGER)])

    assert eager.choices == plain.choices
    assert (plain.timings.num_drafts, plain.timings.num_accepted) == (0, 0)
    timings = eager.timings
    assert 0 < timings.num_drafts < len(eager.token_ids) / 2
    assert timings.num_drafts <= timings.num_accepted <= timings.num_drafted
    assert timings.acceptance_rate == timings.num_accepted / timings.num_drafted
    assert timings.mean_accepted_length == timings.num_accepted / timings.num_drafts
    assert plain.timings.acceptance_rate is plain.timings.mean_accepted_length is None


async def test_the_servers_health_tells_how_guesses_fared(server: tuple[System, str], client: Client) -> None:
    async def counts() -> list[int]:
        body = await to_thread.run_sync(lambda: urlopen(f"http://127.0.0.1:{server[0].port}/health").read())
        health = json.loads(body)
        return [health[name] for name in ("drafts", "drafted_tokens", "accepted_tokens")]

    before = await counts()
    timings = (await ask(client, EAGER).result()).timings

    told = [new - old for old, new in zip(before, await counts(), strict=True)]
    assert told == [timings.num_drafts, timings.num_drafted, timings.num_accepted]


async def test_a_request_that_says_nothing_gets_what_the_server_says(eager_uri: str) -> None:
    async with connect(eager_uri) as client:
        silent, plain = await results([ask(client, None), ask(client, "off")])

    assert silent.timings.num_accepted > 0
    assert plain.timings.num_accepted == 0
    assert silent.token_ids == plain.token_ids


async def test_marked_tokens_are_those_that_came_true_in_drafts(client: Client) -> None:
    stream = ask(client, EAGER, mark_guessed=True, n=2)
    guessed = {choice: list[int]() for choice in (0, 1)}
    async for delta in stream:
        guessed[delta.choice] += delta.guessed or ()
    result = await stream.result()

    assert sum(map(len, guessed.values())) == result.timings.num_accepted > 0
    assert all(indices == sorted(set(indices)) for indices in guessed.values())
    assert 0 not in guessed[0]  # the first token comes of the prompt


async def test_a_stop_string_within_a_draft_ends_the_text_there(client: Client) -> None:
    options = {"stop": ["then sing"], "logprobs": 2}
    plain, eager = await results([ask(client, "off", **options), ask(client, EAGER, **options)])

    assert eager.choices == plain.choices
    assert eager.finish_reason == "stop"
    assert eager.timings.num_accepted > 0


async def test_guessing_goes_on_when_the_executor_is_killed(server: tuple[System, str], client: Client) -> None:
    (plain,) = await results([ask(client, "off")])
    streams = [ask(client, EAGER, adapter=None) for _ in range(8)]

    await kill_executor(server[0])
    finished = await results(streams)

    assert [result.token_ids for result in finished] == [plain.token_ids] * 8


def damage_store(data_dir: Path) -> None:
    for path in data_dir.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-4] + b"ruin")


async def guided(client: Client) -> Any:
    """What a request that says nothing says, once the server's heads are on the device."""
    with anyio.fail_after(60):
        while not (result := await ask(client, None).result()).timings.num_accepted:
            pass
    return result


HEADS = Speculation(ngram=False, always=True)
NAMED = msgspec.structs.replace(HEADS, heads="base-heads")
STATIC = msgspec.structs.replace(NAMED, tree=[[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 7]])


@pytest.mark.parametrize("adapter", [None, "upper", "rot13"])
async def test_heads_of_another_adapter_can_be_named(client: Client, adapter: str | None) -> None:
    plain, *guided = await results([ask(client, one, adapter=adapter) for one in ("off", NAMED, STATIC)])

    assert all(one.choices == plain.choices for one in guided)
    assert all(one.timings.num_accepted > 0 for one in guided)


async def test_heads_are_named_as_such_wherever_the_adapter_comes_from(client: Client) -> None:
    path = str(DEMO_ADAPTERS / "upper")
    plain, guided = await results([ask(client, one, adapter=path, adapter_source="local") for one in ("off", NAMED)])

    assert guided.choices == plain.choices
    assert guided.timings.num_accepted > 0


async def test_nobody_asks_for_heads_where_none_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: DefaultHeads, lease: Lease) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(DefaultHeads, "question", refuse)
    dummy = msgspec.structs.replace(config(tmp_path, NAMED), model=ModelConfig(engine="dummy"))
    async with serve(dummy) as (_, uri), connect(uri) as client:
        assert (await ask(client, None, max_tokens=3).result()).finish_reason == "length"


async def test_an_adapter_that_is_heads_alone_is_the_base(client: Client) -> None:
    plain, guided = await results([ask(client, "off"), ask(client, HEADS, adapter="base-heads")])

    assert guided.choices == plain.choices
    assert guided.timings.num_accepted > 0


async def test_heads_that_are_not_there_are_refused(client: Client, tmp_path: Path) -> None:
    await client.adapters.create("headless", rank=1)

    with pytest.raises(AdapterNotFound):
        await ask(client, Speculation(heads="nobody")).result()
    with pytest.raises(AdapterInvalid, match="has none"):
        await ask(client, Speculation(heads="headless"), adapter="upper").result()
    with pytest.raises(ConfigInvalid, match="nobody"):
        registry_config(config(tmp_path, Speculation(heads="nobody")))


async def test_heads_that_the_server_names_go_with_the_base_alone(named: tuple[System, str]) -> None:
    async with connect(named[1]) as client:
        await guided(client)
        await client.adapters.create("headless", rank=1)
        base, auto, heads, headless, upper = await results(
            [
                *[ask(client, choice) for choice in (None, "auto", HEADS)],
                *[ask(client, None, adapter=adapter) for adapter in ("headless", "upper")],
            ]
        )

    assert base.timings.num_accepted > 0
    assert base.timings.num_accepted == auto.timings.num_accepted == heads.timings.num_accepted
    assert headless.token_ids == base.token_ids
    assert headless.timings.num_accepted == 0
    assert upper.timings.num_accepted > 0  # its own heads


async def test_the_base_goes_on_without_the_servers_heads_when_their_adapter_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(config(tmp_path, NAMED)) as (_, uri), connect(uri) as client:
        first = await guided(client)
        await (await client.adapters.open("base-heads")).destroy()
        plain = await results([ask(client, None) for _ in range(4)])
        with pytest.raises(AdapterNotFound):
            await ask(client, NAMED).result()  # who names them has to hear of it

    assert [result.token_ids for result in plain] == [first.token_ids] * 4
    assert [result.timings.num_accepted for result in plain] == [0] * 4
    assert caplog.text.count("without the draft heads") == 1


async def test_the_base_goes_on_without_the_servers_heads_when_their_file_is_damaged(
    named: tuple[System, str],
) -> None:
    system, uri = named
    async with connect(uri) as client:
        first = await guided(client)
        damage_store(Path(system.config.data_dir))
        await kill_executor(system)
        (plain,) = await results([ask(client, None)])
        mended = await guided(client)

    assert plain.token_ids == mended.token_ids == first.token_ids
    assert plain.adapter_digest is first.adapter_digest is None
    assert plain.timings.num_accepted == 0
    assert mended.timings.num_accepted == first.timings.num_accepted


async def test_more_heads_than_the_configuration_allows_are_refused(eager_uri: str) -> None:
    async with connect(eager_uri) as client:
        with pytest.raises(AdapterInvalid, match="1 to 3 are allowed"):
            await ask(client, NAMED).result()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (Speculation(min_ngram=5, max_ngram=4), "min_ngram"),
        (Speculation(tree=[[0], [1, 0]]), r"\[1, 0\] and not \[1\]"),
        (Speculation(tree=[[0], [1], [0]]), "twice"),
    ],
)
async def test_settings_that_contradict_themselves_are_refused(
    client: Client, tmp_path: Path, wrong: Speculation, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        await ask(client, wrong).result()
    with pytest.raises(ConfigInvalid, match=reason):
        check_config(config(tmp_path, wrong))


async def test_the_terminal_colors_what_was_guessed(client: Client) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    stream = ask(client, EAGER, mark_guessed=True, logprobs=0)

    result = await print_stream(stream, console, shows_speculation=True)

    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "\x1b[1;32m" in shown
    assert f"{result.timings.num_accepted} of them guessed" in shown

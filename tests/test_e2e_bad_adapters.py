"""Adapters that are wrong in every way a user may manage: a typed error each, and nobody else notices.

Also here: what one adapter has computed is never another's.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

import spoilers
from descant.assembly.system import System
from descant.config import KeyConfig, hash_key
from descant_client import connect
from descant_client.client import Client
from descant_client.errors import (
    AdapterForbidden,
    AdapterInvalid,
    AdapterNotFound,
    AdapterUnsupported,
    DescantError,
    InvalidRequest,
)
from servers import (
    ANSWER,
    BEGIN,
    VOCAB_SIZE,
    Checkpoint,
    Neighbor,
    answers,
    model_config,
    raw,
    results,
    serve,
    wait_until,
    worker_of,
)
from spoilers import CONFIG, TENSORS
from tiny_models import greedy, load_adapted, load_model, save_adapter, save_model, tiny_config

pytestmark = pytest.mark.anyio

KEY, GUARDED_KEY = "dsc_of_somebody", "dsc_of_somebody_else"


@pytest.fixture(scope="module")
async def server(
    checkpoint: Checkpoint, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[System, str]]:
    """A server with two keys: one may name any directory, the other those below `root`."""
    keys = [KeyConfig(name="any", sha256=hash_key(KEY), roots=["/"])]
    keys.append(KeyConfig(name="guarded", sha256=hash_key(GUARDED_KEY), roots=[str(root)]))
    config = msgspec.structs.replace(model_config(checkpoint, tmp_path_factory.mktemp("data")), keys=keys)
    async with serve(config) as running:
        yield running


@pytest.fixture(scope="module")
def root(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an adapter and a way out, and beside it one whose name begins like it."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(checkpoint.adapters["beta"], root / "allowed")
    shutil.copytree(checkpoint.adapters["beta"], Path(f"{root}less"))
    (root / "way-out").symlink_to(checkpoint.adapters["beta"])
    return root


@pytest.fixture(scope="module")
async def client(server: tuple[System, str]) -> AsyncIterator[Client]:
    async with connect(server[1], KEY) as client:
        yield client


@pytest.fixture(scope="module")
async def guarded(server: tuple[System, str]) -> AsyncIterator[Client]:
    async with connect(server[1], GUARDED_KEY) as client:
        yield client


@pytest.fixture(scope="module")
async def healthy_client(server: tuple[System, str]) -> AsyncIterator[Neighbor]:
    async with connect(server[1], KEY) as client:
        yield await Neighbor.beside(client, num_tokens=24, adapter="gamma")


@pytest.fixture
async def healthy(healthy_client: Neighbor) -> AsyncIterator[None]:
    """A stream that runs beside the test and is not disturbed by it."""
    async with healthy_client.singing():
        yield


async def _refusal(client: Client, adapter: str | Path) -> DescantError:
    with pytest.raises(DescantError) as refusal:
        await client.generate("x", adapter=str(adapter), max_tokens=4).result()
    return refusal.value


@pytest.fixture
def broken(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A copy of a good adapter, to be spoiled."""
    return Path(shutil.copytree(checkpoint.adapters["alpha"], tmp_path / "broken"))


# ---- no leak -------------------------------------------------------------------------------------------------------


async def test_one_prompt_through_base_a_b_and_a_again_shares_nothing_but_what_is_a_s(
    checkpoint: Checkpoint, client: Client
) -> None:
    prompt = [BEGIN, *b"the very same prompt for everybody, four blocks of the cache and a bit more", ANSWER]
    voices = [None, "alpha", "beta", "alpha", None]
    options = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}

    warm = [await client.generate(prompt, adapter=voice, **options).result() for voice in voices]

    assert [result.usage.num_cached_tokens for result in warm] == [0, 0, 0, 64, 64]
    base = load_model(checkpoint.base)
    judges = [base, *[load_adapted(checkpoint.base, checkpoint.adapters[name]) for name in ("alpha", "beta")]]
    expected = [greedy(judge, prompt, 24) for judge in judges]
    assert [result.token_ids for result in warm] == [expected[at] for at in (0, 1, 2, 1, 0)]


async def test_what_an_adapter_wrote_is_not_found_under_its_files_other_content(
    client: Client, checkpoint: Checkpoint, broken: Path
) -> None:
    prompt = "another prompt that fills some blocks of the cache"
    options = {"seed": 1, "max_tokens": 16}
    first = await client.generate(prompt, adapter="alpha", **options).result()

    same = await client.generate(prompt, adapter=str(broken), **options).result()
    spoilers.change_tensors(broken, lambda tensor: tensor * 1.5)
    kept = await client.generate(prompt, adapter=str(broken), **options).result()
    shutil.copytree(broken, broken.parent / "other")
    other = await client.generate(prompt, adapter=str(broken.parent / "other"), **options).result()

    assert answers([same]) == answers([first]) == answers([kept])
    assert same.usage.num_cached_tokens > 0  # the same content under another path is the same version
    assert other.usage.num_cached_tokens == 0
    assert answers([other]) != answers([first])


# ---- what is no adapter for this model -----------------------------------------------------------------------------


async def test_names_and_paths_of_nothing_are_not_found(client: Client, tmp_path: Path, healthy: None) -> None:
    for adapter in ("nobody", tmp_path / "nothing", f"local:{tmp_path}/no/where", "/dev/null", "/" + "x" * 4000):
        assert isinstance(await _refusal(client, adapter), AdapterNotFound), adapter


async def test_what_is_no_reference_is_refused_as_such(client: Client) -> None:
    for adapter in ("", "a\0b", "x" * 5000, "-dash", "ünïcode"):
        assert isinstance(await _refusal(client, adapter), InvalidRequest), adapter
    for adapter in ("org/repo", "hub:org/repo", "s3://bucket/key", "pbase:1"):
        assert isinstance(await _refusal(client, adapter), AdapterUnsupported), adapter


@pytest.mark.parametrize(
    "spoil",
    [
        spoilers.truncate,
        spoilers.flip_header,
        spoilers.lie_about_the_header,
        spoilers.empty,
        spoilers.write_pickle,
        spoilers.write_torch_pickle,
        spoilers.make_nan,
        spoilers.make_infinite,
        spoilers.no_config,
        spoilers.garbled_config,
        spoilers.deep_config,
        spoilers.no_tensors,
        spoilers.no_file_but_a_pipe,
    ],
)
async def test_damaged_files_are_invalid(
    client: Client, broken: Path, spoil: Callable[[Path], None], healthy: None
) -> None:
    spoil(broken)

    error = await _refusal(client, broken)

    assert isinstance(error, AdapterInvalid), error
    assert str(broken) in str(error)


async def test_an_adapter_for_another_model_is_refused_with_both_shapes(
    client: Client, tmp_path: Path, healthy: None
) -> None:
    save_model(tmp_path / "wider", tiny_config("llama", vocab_size=VOCAB_SIZE, hidden_size=64, head_dim=16))
    save_adapter(tmp_path / "adapter", tmp_path / "wider")

    error = await _refusal(client, tmp_path / "adapter")

    assert isinstance(error, AdapterInvalid)
    assert "[4, 64]" in str(error)
    assert "[4, 48]" in str(error)


async def test_an_adapter_for_a_deeper_model_is_refused_by_the_layer(
    client: Client, tmp_path: Path, healthy: None
) -> None:
    save_model(tmp_path / "deeper", tiny_config("llama", vocab_size=VOCAB_SIZE, num_hidden_layers=3))
    save_adapter(tmp_path / "adapter", tmp_path / "deeper")

    error = await _refusal(client, tmp_path / "adapter")

    assert isinstance(error, AdapterInvalid)
    assert "layers.2" in str(error)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"a_key_of_the_future": 3}, "a_key_of_the_future"),
    ],
)
async def test_what_is_more_than_lora_is_refused_by_name(
    client: Client, broken: Path, changes: dict[str, object], named: str
) -> None:
    path = broken / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    error = await _refusal(client, broken)

    assert isinstance(error, AdapterUnsupported)
    assert named in str(error)


async def test_one_bad_member_refuses_the_sum(client: Client, broken: Path) -> None:
    spoilers.truncate(broken)

    with pytest.raises(AdapterInvalid):
        await client.generate("x", adapters=[("alpha", 1.0), (str(broken), 1.0)], max_tokens=2).result()


async def test_an_adapter_that_was_mended_works(client: Client, broken: Path) -> None:
    content = (broken / TENSORS).read_bytes()
    spoilers.truncate(broken)
    assert isinstance(await _refusal(client, broken), AdapterInvalid)

    (broken / TENSORS).write_bytes(content)

    mended, good = await results(
        [client.generate("x", adapter=adapter, seed=1, max_tokens=8) for adapter in (str(broken), "alpha")]
    )
    assert answers([mended]) == answers([good])


async def test_many_requests_for_one_bad_adapter_all_hear_of_it(client: Client, broken: Path) -> None:
    spoilers.truncate(broken)
    streams = [client.generate("x", adapter=str(broken), max_tokens=2) for _ in range(8)]

    for stream in streams:
        with pytest.raises(AdapterInvalid):
            await stream.result()


async def test_a_client_that_vanishes_while_its_adapter_is_prepared_leaves_nothing(
    server: tuple[System, str], broken: Path
) -> None:
    system, uri = server
    async with raw(uri, token=KEY) as client:
        session = (await client.receive())["session"]
        await client.generate(adapter=str(broken), max_tokens=8, seed=1)
        client.vanish()
    async with raw(uri, token=KEY, session=session) as back:
        await back.receive()
        await back.send("resume", have={})
        messages = await back.until("done")

    assert messages[-1]["usage"]["num_output_tokens"] == 8
    await wait_until(lambda: session not in [one.id for one in system.services.sessions])


@pytest.mark.parametrize("num_kills", [1, pytest.param(7, marks=pytest.mark.slow)])  # an actor may crash 5 times
async def test_a_worker_that_is_killed_costs_nobody_anything(
    server: tuple[System, str], client: Client, broken: Path, healthy: None, num_kills: int
) -> None:
    system = server[0]
    for number in range(num_kills):
        copy = shutil.copytree(broken, broken.parent / str(number))
        os.kill(worker_of(os.getpid()), signal.SIGKILL)

        assert (await client.generate("x", adapter=str(copy), max_tokens=2).result()).token_ids

    assert system.failure is None


# ---- roots ---------------------------------------------------------------------------------------------------------


async def test_a_path_below_the_roots_is_served(guarded: Client, root: Path) -> None:
    inside, named = await results(
        [guarded.generate("x", adapter=one, seed=1, max_tokens=8) for one in (f"{root}/allowed", "beta")]
    )

    assert answers([inside]) == answers([named])


@pytest.mark.parametrize(
    "path", ["/etc", "{base}", "{root}/../base", "{root}/way-out", "~", "~root", "{root}less", "{root}/../nothing/here"]
)
async def test_a_path_outside_the_roots_is_forbidden_whether_it_exists_or_not(
    guarded: Client, root: Path, checkpoint: Checkpoint, path: str
) -> None:
    error = await _refusal(guarded, path.format(root=root, base=checkpoint.base))

    assert isinstance(error, AdapterForbidden)

"""The life of an adapter, against the tiny model: what it says at every station, judged by the base and fresh loads."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from descant_client import Adapter, Client, Combination, connect
from descant_client.errors import AdapterExists, AdapterInvalid, AdapterNotFound
from servers import BEGIN, Checkpoint, model_config, raw, serve

pytestmark = pytest.mark.anyio

PROMPT = [BEGIN, 104, 105, 33]
GREEDY = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
async def uri(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    async with serve(model_config(checkpoint, tmp_path_factory.mktemp("data"))) as (_, uri):
        yield uri


@pytest.fixture
async def client(uri: str) -> AsyncIterator[Client]:
    """A client; what it registered is gone after the test."""
    async with connect(uri) as client:
        before = {one.name for one in await client.adapters.list()}
        yield client
        for adapter in await client.adapters.list():
            if adapter.name not in before:
                await adapter.destroy()


async def says(client: Client, adapter: str | Adapter | None = None, **options: Any) -> list[int]:
    """Return the greedy answer."""
    return (await client.generate(PROMPT, adapter=adapter, **GREEDY, **options).result()).token_ids


def judged(base: Path, adapter: Path | None = None) -> list[int]:
    """Return the greedy answer of Transformers and PEFT."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        output = model.generate(
            input_ids=torch.tensor([PROMPT]), max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
        )
    return output[0, len(PROMPT) :].tolist()


async def test_a_new_adapter_says_what_the_base_says(client: Client) -> None:
    created = await client.adapters.create("mine", rank=4, alpha=8.0, target_modules=["q_proj", "down_proj"])

    assert await says(client, "mine") == await says(client)
    assert (created.rank, created.source, created.is_shared) == (4, "create", False)
    with pytest.raises(AdapterExists):
        await client.adapters.create("mine")


async def test_a_fork_and_its_origin_go_their_own_ways(client: Client, checkpoint: Checkpoint) -> None:
    origin = await client.adapters.load("origin", checkpoint.adapters["beta"])
    fork = await origin.fork("fork")
    expected = await says(client, origin)
    assert (fork.digest, await says(client, fork)) == (origin.digest, expected)

    await origin.load(checkpoint.adapters["gamma"])

    assert await says(client, fork) == expected != await says(client, origin)


async def test_a_hot_swap_changes_the_answer_to_that_of_a_fresh_load(client: Client, checkpoint: Checkpoint) -> None:
    swapped = await client.adapters.load("swapped", checkpoint.adapters["alpha"])
    before = await says(client, swapped)

    await swapped.load(checkpoint.adapters["delta"])

    fresh = await client.adapters.load("fresh", checkpoint.adapters["delta"])
    assert await says(client, swapped) == await says(client, fresh) != before
    assert (swapped.digest, swapped.rank) == (fresh.digest, 16)
    assert await says(client, swapped) == judged(checkpoint.base, checkpoint.adapters["delta"])


async def test_a_saved_adapter_loads_in_peft_and_comes_back_the_same(
    client: Client, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    adapter = await client.adapters.load("mine", checkpoint.adapters["gamma"])

    await adapter.save(tmp_path / "saved")

    expected = await says(client, adapter)
    assert judged(checkpoint.base, tmp_path / "saved") == expected
    again = await client.adapters.load("again", tmp_path / "saved")
    assert await says(client, again) == expected


async def test_what_is_disabled_says_what_the_base_says_until_it_is_enabled(
    client: Client, checkpoint: Checkpoint
) -> None:
    adapter = await client.adapters.load("mine", checkpoint.adapters["beta"])
    base, acting = await says(client), await says(client, adapter)
    assert base != acting

    assert not (await adapter.disable()).is_enabled
    result = await client.generate(PROMPT, adapter=adapter, **GREEDY).result()
    assert (result.token_ids, result.adapter_digest) == (base, None)

    assert (await adapter.enable()).is_enabled
    assert await says(client, adapter) == acting


async def test_a_pin_is_seen_and_changes_no_answer(client: Client, checkpoint: Checkpoint) -> None:
    adapter = await client.adapters.load("mine", checkpoint.adapters["beta"])
    expected = await says(client, adapter)

    assert (await adapter.pin()).is_pinned
    assert await says(client, adapter) == expected
    (seen,) = [one for one in await client.adapters.list() if one.name == "mine"]
    assert seen.is_pinned
    assert not (await adapter.unpin()).is_pinned


async def test_a_destroyed_adapter_is_not_found_any_more(client: Client, checkpoint: Checkpoint) -> None:
    adapter = await client.adapters.load("mine", checkpoint.adapters["beta"])

    await adapter.destroy()

    assert await client.adapters.open("mine") is None
    with pytest.raises(AdapterNotFound):
        await says(client, "mine")
    await client.adapters.create("mine")  # the name is free


async def test_a_load_that_fails_leaves_what_was_there(client: Client, checkpoint: Checkpoint, tmp_path: Path) -> None:
    adapter = await client.adapters.load("mine", checkpoint.adapters["beta"])
    expected = await says(client, adapter)
    (tmp_path / "broken").mkdir()

    with pytest.raises(AdapterInvalid):
        await adapter.load(tmp_path / "broken")

    assert await says(client, "mine") == expected


# ---- combinations --------------------------------------------------------------------------------------------------

MEMBERS = [("alpha", 0.75), ("gamma", -0.5), ("delta", 0.25)]
COMBINATIONS = [
    Combination(),
    Combination("svd", rank=6),
    Combination("ties_svd", rank=8, density=0.6),
    Combination("dare_linear_svd", density=0.5, seed=9),
    Combination("magnitude_prune_svd", rank=5, density=0.5, clamp=0.99),
]


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda combination: combination.type)
async def test_a_merge_by_name_and_one_per_request_say_the_same(client: Client, combination: Combination) -> None:
    how = {name: getattr(combination, name) for name in combination.__struct_fields__}
    named = await client.adapters.merge("merged", MEMBERS, **how)

    asked = client.generate(PROMPT, adapters=MEMBERS, combination=combination, **GREEDY)

    result = await asked.result()
    assert (result.adapter_digest, result.token_ids) == (named.digest, await says(client, named))
    assert result.token_ids != await says(client)


async def test_loras_way_of_asking_is_read_with_the_same_meaning(client: Client, uri: str) -> None:
    same_rank = [("alpha", 1.0), ("twin", 0.5)]
    alpha = await client.adapters.open("alpha")
    assert alpha is not None
    await alpha.fork("twin")
    expected = await client.generate(
        PROMPT, adapters=same_rank, combination=Combination("ties", density=0.5), **GREEDY
    ).result()
    merged = {"ids": ["alpha", "twin"], "weights": [1.0, 0.5], "merge_strategy": "ties", "density": 0.5}
    async with raw(uri) as hand:
        fields = {"token_ids": PROMPT, "merged_adapters": merged, "sampling": {"temperature": 0.0}}
        await hand.send("generate", max_tokens=12, ignore_eos=True, **fields)
        messages = await hand.until("done")

    assert next(one for one in messages if one["type"] == "accepted")["adapter_digest"] == expected.adapter_digest
    tokens = [token_id for one in messages if one["type"] == "delta" for token_id in one["token_ids"]]
    assert tokens == expected.token_ids


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"adapter": "alpha", "combination": {"type": "svd"}}, "combination"),
    ({"combination": {}}, "combination"),
    ({"adapter": "alpha", "adapters": [["beta", 1.0]]}, "adapters"),
    ({"adapter": "alpha", "merged_adapters": {"ids": ["alpha"]}}, "merged_adapters"),
    ({"adapters": [["beta", 1.0]], "merged_adapters": {"ids": ["alpha"]}}, "merged_adapters"),
    ({"adapters": [["beta", 1.0]], "combination": {"type": "ties"}}, "combination.density"),
    ({"merged_adapters": {"ids": ["alpha"], "weights": [1.0, 2.0]}}, "merged_adapters.weights"),
]


@pytest.mark.parametrize(("fields", "field"), REFUSED)
async def test_what_contradicts_itself_is_refused_by_field(uri: str, fields: dict[str, Any], field: str) -> None:
    async with raw(uri) as hand:
        await hand.generate(**fields)
        error = (await hand.until("error"))[-1]

    assert (error["code"], error["data"]["field"]) == ("invalid_request", field)


async def test_a_combination_of_other_ranks_than_it_takes_is_refused(client: Client) -> None:
    with pytest.raises(AdapterInvalid, match="equal"):
        await client.adapters.merge("merged", MEMBERS, type="linear")
    assert await client.adapters.open("merged") is None


# ---- what stays ----------------------------------------------------------------------------------------------------


async def test_base_and_adapter_merged_is_an_ordinary_checkpoint(
    client: Client, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    adapter = await client.adapters.load("mine", checkpoint.adapters["gamma"])

    await adapter.merge_and_save(tmp_path / "merged")

    assert judged(tmp_path / "merged") == await says(client, adapter)


async def test_a_server_that_comes_back_has_every_name_as_it_was(checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = model_config(checkpoint, tmp_path)
    async with serve(config) as (_, uri), connect(uri) as client:
        loaded = await client.adapters.load("loaded", checkpoint.adapters["beta"])
        await loaded.fork("forked")
        await (await client.adapters.create("made")).disable()
        await (await client.adapters.merge("merged", MEMBERS)).pin()
        await (await loaded.fork("gone")).destroy()
        before = {one.name: one.info for one in await client.adapters.list()}
        said = {name: await says(client, name) for name in ("loaded", "forked", "made", "merged")}
    async with serve(config) as (_, uri), connect(uri) as client:
        after = {one.name: one.info for one in await client.adapters.list()}

        assert {name: after[name] for name in said} == {name: before[name] for name in said}
        assert list(after) == list(before)
        assert {name: await says(client, name) for name in said} == said

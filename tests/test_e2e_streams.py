"""One server of a tiny model, asked everything a client may ask; the judges are PEFT and the server itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
import torch

from descant.assembly.system import System
from descant_client import connect
from descant_client.client import Client
from servers import (
    ADAPTERS,
    ANSWER,
    BEGIN,
    END,
    Checkpoint,
    answers,
    model_config,
    results,
    serve,
    wait_until,
    worker_of,
)
from tiny_models import greedy, load_adapted, load_model

pytestmark = pytest.mark.anyio

FIRST_BYTE_IS_A = {"logit_bias": {ord("a"): 100.0}}


@pytest.fixture(scope="module")
async def server(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[System, str]]:
    async with serve(model_config(checkpoint, tmp_path_factory.mktemp("data"))) as running:
        yield running


@pytest.fixture(scope="module")
async def client(server: tuple[System, str]) -> AsyncIterator[Client]:
    async with connect(server[1]) as client:
        yield client


async def test_base_and_every_adapter_in_one_batch_say_what_peft_says(client: Client, checkpoint: Checkpoint) -> None:
    prompt = [BEGIN, *b"one prompt for all of them", ANSWER]
    options = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}

    streams = [client.generate(prompt, adapter=name, **options) for name in (None, *ADAPTERS)]
    said = [result.token_ids for result in await results(streams)]

    judges = [load_model(checkpoint.base), *[load_adapted(checkpoint.base, checkpoint.adapters[a]) for a in ADAPTERS]]
    assert said == [greedy(judge, prompt, 24) for judge in judges]
    assert len({tuple(token_ids) for token_ids in said}) == 5


async def test_a_weighted_sum_says_what_the_merged_weights_say(client: Client, checkpoint: Checkpoint) -> None:
    members = [("alpha", 0.5), ("gamma", -1.25)]
    prompt = [BEGIN, *b"a sum", ANSWER]

    stream = client.generate(prompt, adapters=members, max_tokens=24, temperature=0.0, ignore_eos=True)
    said = (await stream.result()).token_ids

    assert said == greedy(_weighted(checkpoint, members), prompt, 24)


def _weighted(checkpoint: Checkpoint, members: list[tuple[str, float]]) -> Any:
    base = load_model(checkpoint.base)
    weights = dict(base.named_parameters())
    for name, weight in members:
        merged = load_adapted(checkpoint.base, checkpoint.adapters[name]).merge_and_unload()
        plain = dict(load_model(checkpoint.base).named_parameters())
        with torch.no_grad():
            for key, parameter in merged.named_parameters():
                weights[key] += weight * (parameter - plain[key])
    return base


async def test_a_sum_of_one_adapter_with_weight_one_is_that_adapter(client: Client) -> None:
    options = {"seed": 1, "max_tokens": 32}

    alone, summed = await results(
        [client.generate("x", adapter="beta", **options), client.generate("x", adapters=[("beta", 1.0)], **options)]
    )

    assert answers([alone]) == answers([summed])


async def test_each_request_is_the_same_alone_and_in_a_batch(client: Client) -> None:
    options = [{"adapter": name, "seed": seed, "max_tokens": 20} for name in (None, *ADAPTERS) for seed in (1, 2)]

    alone = [await client.generate("same", **each).result() for each in options]
    together = await results([client.generate("same", **each) for each in options])

    assert answers(alone) == answers(together)


async def test_an_adapter_is_found_by_path_too(client: Client, checkpoint: Checkpoint) -> None:
    path = str(checkpoint.adapters["alpha"])
    options = {"seed": 1, "max_tokens": 16}

    named, at_path, from_source = await results(
        [
            client.generate("x", adapter="alpha", **options),
            client.generate("x", adapter=path, **options),
            client.generate("x", adapter=path, adapter_source="local", **options),
        ]
    )

    assert answers([named]) == answers([at_path]) == answers([from_source])


async def test_a_chat_is_its_template_rendered(client: Client) -> None:
    prompt = [BEGIN, *b"user: hi", BEGIN, *b"assistant: yes?", ANSWER]

    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    chatted, plain = await results([client.generate(p, seed=3, max_tokens=16) for p in (chat, prompt)])

    assert answers([chatted]) == answers([plain])
    assert chatted.usage.num_prompt_tokens == len(prompt)


async def test_choices_differ_and_do_not_depend_on_how_many_there_are(client: Client) -> None:
    three, two, one = await results([client.generate("many", n=n, seed=9, max_tokens=24) for n in (3, 2, 1)])

    assert len({tuple(choice.token_ids) for choice in three.choices}) == 3
    assert answers([three])[0][:2] == answers([two])[0]
    assert answers([two])[0][:1] == answers([one])[0]
    assert three.usage.num_output_tokens == sum(len(choice.token_ids) for choice in three.choices)


async def test_a_seed_makes_the_same_answer_again(client: Client) -> None:
    first = await client.generate("luck", max_tokens=32).result()

    again, other = await results([client.generate("luck", max_tokens=32, seed=s) for s in (first.seed, first.seed ^ 1)])

    assert answers([again]) == answers([first])
    assert answers([other]) != answers([first])


async def test_temperature_zero_asks_no_seed(client: Client) -> None:
    one, other = await results([client.generate("sure", max_tokens=16, temperature=0.0, seed=s) for s in (1, 2)])

    assert answers([one]) == answers([other])


async def test_logprobs_come_with_every_token_and_greedy_takes_the_likeliest(client: Client) -> None:
    result = await client.generate("p", max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=3).result()

    assert result.logprobs is not None
    assert [entry.token_id for entry in result.logprobs] == result.token_ids
    for entry in result.logprobs:
        values = [one.logprob for one in entry.top]
        assert entry.top[0].token_id == entry.token_id
        assert values == sorted(values, reverse=True)
        assert len(values) == 3
        assert entry.logprob == values[0] < 0.0


async def test_logprobs_are_those_of_transformers(client: Client, checkpoint: Checkpoint) -> None:
    prompt = [BEGIN, *b"log", ANSWER]

    result = await client.generate(
        prompt, max_tokens=6, seed=1, ignore_eos=True, logprobs=0, prompt_logprobs=0
    ).result()

    with torch.no_grad():
        ids = prompt + result.token_ids
        table = load_model(checkpoint.base)(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(table[at, ids[at + 1]]) for at in range(len(ids) - 1)]
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    entries = [*result.prompt_logprobs[1:], *(result.logprobs or [])]
    assert [entry.logprob for entry in entries if entry] == pytest.approx(expected, abs=1e-4)


async def test_prompt_logprobs_are_the_same_with_the_prefix_in_the_cache(client: Client) -> None:
    prompt = "a prompt long enough to fill more than two blocks of the cache"

    cold = await client.generate(prompt, max_tokens=1, prompt_logprobs=2).result()
    await client.generate(prompt, max_tokens=1).result()
    warm = await client.generate(prompt, max_tokens=1, prompt_logprobs=2).result()

    assert warm.prompt_logprobs == cold.prompt_logprobs
    assert cold.prompt_logprobs is not None
    assert len(cold.prompt_logprobs) == len(prompt) + 2


async def test_a_stop_string_across_tokens_ends_the_text_before_it(client: Client) -> None:
    whole = await client.generate("stop", seed=4, max_tokens=60, ignore_eos=True).result()
    ascii_runs = [at for at in range(10, 50) if all(32 <= t < 127 for t in whole.token_ids[at : at + 3])]
    at = ascii_runs[0]
    stop = bytes(whole.token_ids[at : at + 3]).decode()

    result = await client.generate("stop", seed=4, max_tokens=60, ignore_eos=True, stop=["never said!", stop]).result()

    assert result.finish_reason == "stop"
    assert result.text == whole.text.partition(stop)[0]
    assert result.token_ids == whole.token_ids[: len(result.token_ids)]
    assert len(result.token_ids) <= at + 3


async def test_a_stop_token_ends_the_answer_and_is_no_part_of_its_text(client: Client) -> None:
    result = await client.generate(
        "stop", max_tokens=9, temperature=0.0, stop_token_ids=[ord("a")], **FIRST_BYTE_IS_A
    ).result()

    assert (result.token_ids, result.text, result.finish_reason) == ([ord("a")], "", "stop")


async def test_the_end_token_ends_the_answer_unless_it_is_ignored(client: Client) -> None:
    bias = {END: 100.0}

    ended, ignored = await results(
        [client.generate("end", max_tokens=5, ignore_eos=ignore, logit_bias=bias) for ignore in (False, True)]
    )

    assert (ended.token_ids, ended.finish_reason) == ([END], "stop")
    assert (ignored.token_ids, ignored.finish_reason) == ([END] * 5, "length")


async def test_an_answer_without_a_limit_fills_the_context(client: Client) -> None:
    result = await client.generate([BEGIN] * 500, ignore_eos=True).result()

    assert (len(result.token_ids), result.finish_reason) == (12, "length")


async def test_penalties_change_the_answer(client: Client) -> None:
    options = {"max_tokens": 12, "temperature": 0.0, "logit_bias": {ord("a"): 30.0}, "ignore_eos": True}

    plain, penalized = await results(
        [client.generate("p", **options), client.generate("p", presence_penalty=2.0, top_k=5, **options)]
    )

    assert plain.text == "a" * 12
    assert penalized.usage == plain.usage


async def test_a_cpu_server_does_not_import_triton(client: Client, server: tuple[System, str]) -> None:
    await client.generate("x", adapter="alpha", max_tokens=2).result()

    for pid in (server[0].executor.pid, worker_of(os.getpid())):
        maps = await anyio.Path(f"/proc/{pid}/maps").read_text()
        assert "libtorch" in maps
        assert "libtriton" not in maps


async def test_leaving_the_loop_cancels_at_the_server(client: Client, server: tuple[System, str]) -> None:
    stream = client.generate("on and on", ignore_eos=True)

    async for _ in stream:
        break
    result = await stream.result()

    assert result.finish_reason == "cancelled"
    assert 0 < len(result.token_ids) < 500


async def test_a_stream_cancelled_before_its_first_token_ends_as_cancelled(client: Client) -> None:
    stream = client.generate("never mind", adapter="delta")
    stream.cancel()

    assert (await stream.result()).finish_reason == "cancelled"


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_both_encodings_carry_everything(server: tuple[System, str], client: Client, encoding: Any) -> None:
    options = {"seed": 2, "n": 2, "max_tokens": 16, "logprobs": 2, "prompt_logprobs": 1, "logit_bias": {65: 1.0}}
    expected = await client.generate("both", adapter="alpha", **options).result()

    async with connect(server[1], encoding=encoding) as other:
        result = await other.generate("both", adapter="alpha", **options).result()

    assert result.choices == expected.choices
    assert result.prompt_logprobs == expected.prompt_logprobs


async def test_the_catalog_lists_adapters_in_order_and_opens_them_by_name(client: Client) -> None:
    await client.generate("x", adapter="gamma", max_tokens=1).result()

    listed = await client.adapters.list()
    opened = await client.adapters.open("gamma")

    assert [adapter.name for adapter in listed] == list(ADAPTERS)
    assert opened is not None
    assert (opened.info.rank, opened.info.source) == (8, "local")
    assert opened.info.digest
    assert await client.adapters.open("nobody") is None


async def test_the_hello_and_the_models_tell_the_same(client: Client, checkpoint: Checkpoint) -> None:
    (model,) = await client.models()

    assert client.hello.model == model
    assert (model.id, model.max_context, model.vocab_size) == (str(checkpoint.base), 512, 264)
    assert (model.dtype, model.device) == ("float32", "cpu")


async def test_a_client_whose_connection_drops_sees_one_unbroken_stream(server: tuple[System, str]) -> None:
    async with connect(server[1]) as client:
        expected = await client.generate("again", seed=3, max_tokens=75, ignore_eos=True, n=2).result()
        stream = client.generate("again", seed=3, max_tokens=75, ignore_eos=True, n=2)
        num_drops = 0
        async for delta in stream:
            if min(delta.index, 45) // 15 > num_drops:
                num_drops += 1
                client._connection._current.websocket.transport.abort()
        result = await stream.result()

        await client.generate("still here", max_tokens=1).result()

    assert num_drops == 3
    assert answers([result]) == answers([expected])


@pytest.mark.parametrize("num_connections", [1, pytest.param(200, marks=pytest.mark.slow)])
async def test_two_hundred_streams_at_once_are_all_complete_and_right(
    client: Client, server: tuple[System, str], num_connections: int
) -> None:
    requests = [{"adapter": [None, *ADAPTERS][i % 5], "seed": i % 20, "max_tokens": 6} for i in range(200)]
    expected = answers([await client.generate("choir", **request).result() for request in requests[:20]])

    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(server[1])) for _ in range(num_connections)]
        streams = [clients[i % num_connections].generate("choir", **each) for i, each in enumerate(requests)]

        assert answers(await results(streams)) == expected * 10


async def test_everything_is_gone_when_everybody_has_left(server: tuple[System, str], client: Client) -> None:
    system = server[0]
    async with connect(server[1]) as other:
        await asyncio.gather(*[other.generate("x", max_tokens=3).result() for _ in range(5)])
        other.generate("left open")

    await wait_until(lambda: len(system.services.sessions) == 1 and not len(system.services.sequences), 20.0)

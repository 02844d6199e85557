"""The GPU's way of running steps, on the CPU: padded static batches, replays, pending tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec
import pytest
import torch

import tiny_models
from descant.adapters.prepare import AdapterWorker
from descant.contract.plan import NO_ADAPTER, AdapterSpan, Admit, Row, RowResult, StepPlan, pack_ints, unpack_ints
from descant.contract.version import AdapterVersion
from descant.engine import graphs as graphs_module
from descant.engine.batch import ForwardBatch, PendingTokens
from descant.engine.graphs import StaticBatch, graph_contexts, graph_sizes
from descant.engine.runner import Engine
from descant_client.errors import InvalidRequest
from descant_client.protocol import SamplingParams
from engine_driver import GREEDY, engine_for

CPU = torch.device("cpu")
BLOCKS_PER_ROW = 4
RANKS = (1, 8, 3)
MIXED = (0, NO_ADAPTER, 2, 1, 0)  # adapter slot of each row
RANDOM = SamplingParams(temperature=0.8)


@dataclass
class Pair:
    """Two engines over one model: one computes step by step, the other queues steps as on a GPU."""

    plain: Engine
    queued: Engine
    versions: list[AdapterVersion]

    def place(self, slots: tuple[int, ...]) -> None:
        """Version i lies in `slots[i]` of both engines."""
        for engine in (self.plain, self.queued):
            for at, (slot, version) in enumerate(zip(slots, self.versions, strict=True)):
                engine.load_adapter(slot, at * 2**17, version.path)


def run_again(run: Callable[[], None]) -> Callable[[], None]:
    """A capture for devices without graphs."""
    return run


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = tmp_path_factory.mktemp("model")
    tiny_models.save_model(directory / "base", tiny_models.tiny_config("llama", max_position_embeddings=64))
    worker = AdapterWorker(directory / "base", directory / "store", "float32")
    versions = [
        worker.prepare(f"r{rank}", tiny_models.save_adapter(directory / f"r{rank}", directory / "base", rank, r=rank))
        for rank in RANKS
    ]
    plain = engine_for(directory / "base", num_blocks=40)
    queued = engine_for(directory / "base", num_blocks=40, max_steps_in_flight=2, max_num_batched_tokens=90)
    queued._draws_later = True
    queued._graphs = queued._new_graphs(run_again)
    pair = Pair(plain, queued, versions)
    pair.place((0, 1, 2))
    return pair


def admits(
    sampling: SamplingParams = GREEDY, num_logprobs: int = -1, slots: tuple[int, ...] = MIXED
) -> tuple[Admit, ...]:
    """One row per slot, prompts of different lengths, blocks out of order."""
    blocks = torch.randperm(40, generator=torch.Generator().manual_seed(3)).view(-1, BLOCKS_PER_ROW).tolist()
    prompts = [tiny_models.random_prompt(3 + 5 * row, seed=row) for row in range(len(slots))]
    return tuple(
        Admit(
            row,
            pack_ints(prompt),
            len(prompt),
            0,
            pack_ints(blocks[row]),
            sampling,
            seed=row,
            num_logprobs=num_logprobs,
        )
        for row, prompt in enumerate(prompts)
    )


def plan_rows(admitted: tuple[Admit, ...], step: int, slots: tuple[int, ...] = MIXED) -> tuple[Row, ...]:
    return tuple(
        Row(admit.row, admit.num_prompt_tokens if step == 0 else 1, spans=(AdapterSpan(0, slots[admit.row]),))
        for admit in admitted
    )


def generate(
    engine: Engine, admitted: tuple[Admit, ...], slots: tuple[int, ...] = MIXED, num_steps: int = 7
) -> list[tuple[RowResult, ...]]:
    """Return the results of all steps, with the maximum number of steps in flight."""
    results = []
    for step in range(num_steps):
        plan = StepPlan(0, step, admitted if step == 0 else (), plan_rows(admitted, step, slots))
        engine.launch(plan)
        if len(engine._in_flight) == engine.limits.max_steps_in_flight:
            results.append(engine.collect().rows)
    while engine._in_flight:
        engine.block_until_done()
        results.append(engine.collect().rows)
    engine.step(StepPlan(0, num_steps, drop=pack_ints(range(len(admitted)))))
    return results


def decode_batch(engine: Engine, slots: tuple[int, ...] = MIXED) -> ForwardBatch:
    """Return the batch of the first decode step, on the host. Prompts are computed, and the rows dropped."""
    admitted = admits(slots=slots)
    engine.step(StepPlan(0, 0, admitted, plan_rows(admitted, 0, slots)))
    rows = [(engine._rows[row.row], row) for row in plan_rows(admitted, 1, slots)]
    batch = ForwardBatch.of(rows, engine.limits.block_size, CPU)
    engine.step(StepPlan(0, 1, drop=pack_ints(range(len(slots)))))
    return batch


# ---- static batches -----------------------------------------------------------------------------------------------


def test_graphs_are_captured_for_few_rows_and_for_multiples_of_eight() -> None:
    assert graph_sizes(1) == (1,)
    assert graph_sizes(3) == (1, 2, 3)
    assert graph_sizes(30) == (1, 2, 4, 8, 16, 24, 30)
    assert graph_sizes(32) == (1, 2, 4, 8, 16, 24, 32)


def test_graphs_are_captured_for_short_contexts_and_longer_ones_when_needed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert graph_contexts(100) == (100,)
    assert graph_contexts(2048) == (2048,)
    assert graph_contexts(40_000) == (2048, 16_384, 40_000)
    monkeypatch.setattr(graphs_module, "_SHORT_CONTEXT", 8)
    graphs = pair.queued._new_graphs(run_again)
    short = set(graphs._graphs)

    graphs.forward(decode_batch(pair.plain, (NO_ADAPTER,) * 5), pair.queued._arena.tables())

    assert {key.max_context for key in short} == {8}
    assert set(graphs._graphs) - short == {(8, 64, False)}


@pytest.mark.parametrize("slots", [MIXED, (NO_ADAPTER,) * 3, (2, 2)])
@pytest.mark.parametrize("num_rows", [5, 8, 24])
def test_a_padded_batch_gives_its_rows_the_same_bits_and_writes_nowhere_else(
    pair: Pair, slots: tuple[int, ...], num_rows: int
) -> None:
    decoder, cache, lora = pair.plain._decoder, pair.plain._cache, pair.plain._arena.tables()
    static, pending = StaticBatch(24, 4, CPU), PendingTokens(1, 1, CPU)
    static.fill(decode_batch(pair.plain, (0, 1, 2, 0, 1, 2)), 24)  # content left by an earlier step
    batch = decode_batch(pair.plain, slots)
    expected = decoder.forward(batch, lora)
    written = [tensor.view(torch.int32).clone() for tensor in (*cache.keys, *cache.values)]  # NaN equals itself

    padded = static.fill(batch, num_rows)
    static.resolve_ids(pending)
    hidden = decoder.forward(padded, lora)

    assert torch.equal(hidden[: len(slots)], expected)
    assert len(hidden) == num_rows
    after = [tensor.view(torch.int32) for tensor in (*cache.keys, *cache.values)]
    assert all(torch.equal(a, b) for a, b in zip(after, written, strict=True))


def test_padding_sees_one_position_and_has_no_adapter(pair: Pair) -> None:
    static = StaticBatch(8, 4, CPU)

    padded = static.fill(decode_batch(pair.plain), 8)

    assert padded.slot_mapping[5:].tolist() == [-1] * 3
    assert padded.attention.context_lens[5:].tolist() == [1] * 3 == list(padded.attention.host_context_lens[5:])
    assert (padded.segments.tiles[:, 1].sum(), padded.segments.tiles.shape) == (4, (8, 3))
    assert padded.segments.indptr.tolist() == [0, 2, 3, 4, 4, 4, 4, 4, 4] == list(padded.segments.host_indptr)
    assert padded.segments.slots.tolist() == [0, 1, 2, -1, -1, -1, -1, -1] == list(padded.segments.host_slots)


def test_graphs_see_the_highest_host_integers_and_the_tensors_of_every_step(pair: Pair) -> None:
    static = StaticBatch(8, 4, CPU)

    bounds = static.bounds(8, 64, has_adapter=True)
    filled = static.fill(decode_batch(pair.plain), 8)

    assert bounds.attention.host_context_lens == (64,) * 8
    assert not static.bounds(8, 64, has_adapter=False).segments.has_adapter
    for of_bounds, of_step in (
        (bounds.input_ids, filled.input_ids),
        (bounds.attention.block_tables, filled.attention.block_tables),
        (bounds.segments.tiles, filled.segments.tiles),
    ):
        assert of_bounds.data_ptr() == of_step.data_ptr()
        assert (of_bounds.shape, of_bounds.stride()) == (of_step.shape, of_step.stride())


def test_only_decode_batches_that_fit_are_accepted(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, lora = pair.queued._graphs, pair.queued._arena.tables()
    assert graphs is not None
    batch = decode_batch(pair.plain)

    assert graphs.accepts(batch, lora)
    assert not graphs.accepts(replace(batch, sampled_rows=batch.sampled_rows[1:]), lora)
    assert not graphs.accepts(replace(batch, input_ids=torch.zeros(6, dtype=torch.int64)), lora)
    monkeypatch.setattr(graphs._static, "max_rows", 4)
    assert not graphs.accepts(batch, lora)
    monkeypatch.undo()
    monkeypatch.setattr(graphs_module, "MAX_GRAPH_RANK", 7)
    assert not graphs.accepts(batch, lora)


def test_a_step_is_in_order_with_the_adapters_it_uses(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, log = pair.plain, []
    forward = engine._decoder.forward
    monkeypatch.setattr(engine._arena, "begin_use", lambda slots: log.append(("begin", slots)))
    monkeypatch.setattr(engine._arena, "end_use", lambda slots: log.append(("end", slots)))
    monkeypatch.setattr(engine._decoder, "forward", lambda *args: (log.append("forward"), forward(*args))[1])

    generate(engine, admits(), num_steps=1)

    assert log == [("begin", (0, 1, 2)), "forward", ("end", (0, 1, 2))]


# ---- steps that are queued ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM])
@pytest.mark.parametrize("is_replayed", [True, False])
def test_queued_steps_say_what_steps_one_by_one_say(
    pair: Pair, is_replayed: bool, sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    admitted = admits(sampling, num_logprobs=2)
    if not is_replayed:
        monkeypatch.setattr(pair.queued, "_graphs", None)

    assert generate(pair.queued, admitted) == generate(pair.plain, admitted)


def test_queued_decode_steps_replay_the_smallest_graph_of_their_kind(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, replayed = pair.queued._graphs, []
    assert graphs is not None
    watched = {key: lambda key=key, run=run: (replayed.append(key), run()) for key, run in graphs._graphs.items()}
    monkeypatch.setattr(graphs, "_graphs", watched)

    for slots in ((0, 1, 2), (NO_ADAPTER,) * 5):
        generate(pair.queued, admits(slots=slots), slots, num_steps=3)

    assert replayed == [(4, 64, True)] * 2 + [(8, 64, False)] * 2


def test_adapters_change_between_replays(pair: Pair) -> None:
    slots = (0, 1, 2)
    before = generate(pair.queued, admits(slots=slots), slots)

    pair.place((1, 2, 0))
    after = [generate(engine, admits(slots=slots), slots) for engine in (pair.queued, pair.plain)]
    pair.place((0, 1, 2))

    assert after[0] == after[1] != before
    assert generate(pair.queued, admits(slots=slots), slots) == before


def test_penalties_see_the_tokens_of_the_steps_in_flight(pair: Pair) -> None:
    varied = SamplingParams(temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=1.5)
    mixed = tuple(msgspec.structs.replace(admit, sampling=varied if admit.row % 2 else GREEDY) for admit in admits())

    assert generate(pair.queued, mixed) == generate(pair.plain, mixed)


def test_a_plan_is_held_against_the_rows_as_the_steps_in_flight_will_leave_them(pair: Pair) -> None:
    engine, (admit, *_) = pair.queued, admits()
    engine.launch(StepPlan(0, 0, (admit,), (Row(0, admit.num_prompt_tokens),)))

    with pytest.raises(InvalidRequest, match=f"position 4 is beyond the {admit.num_prompt_tokens + 1} known tokens"):
        engine.launch(StepPlan(0, 1, rows=(Row(0, 2),)))
    engine.launch(StepPlan(0, 1, rows=(Row(0, 1),), drop=b""))

    assert [engine.collect().rows[0].num_computed for _ in range(2)] == [3, 4]
    engine.step(StepPlan(0, 2, drop=pack_ints([0])))


def test_a_row_dropped_while_its_step_is_in_flight_leaves_its_successor_alone(pair: Pair) -> None:
    admit, other = admits()[:2]
    successor = msgspec.structs.replace(other, row=0)
    expected = pair.plain.step(StepPlan(0, 0, (successor,), (Row(0, 8),))).rows
    pair.plain.step(StepPlan(0, 1, drop=pack_ints([0])))
    engine = pair.queued

    engine.launch(StepPlan(0, 0, (admit,), (Row(0, 3),)))
    engine.launch(StepPlan(0, 1, (successor,), (Row(0, 8),), drop=pack_ints([0])))
    first, second = engine.collect(), engine.collect()

    assert (first.rows[0].num_computed, second.rows) == (3, expected)
    assert engine._rows[0].tokens(8, 9).tolist() == unpack_ints(expected[0].token_ids)
    assert not engine._rows[0].has_pending
    engine.step(StepPlan(0, 2, drop=pack_ints([0])))


@pytest.mark.parametrize("name", ["plain", "queued"])
def test_a_row_that_is_lost_stays_lost_and_disturbs_no_other(
    pair: Pair, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, admitted = getattr(pair, name), admits()[:2]
    slots = (NO_ADAPTER,) * 2
    expected = generate(engine, admitted, slots, num_steps=3)
    logits, poison = engine._decoder.logits, torch.tensor([[torch.nan], [0.0]])
    calls = iter((poison, 0.0, 0.0))
    monkeypatch.setattr(engine._decoder, "logits", lambda *args: logits(*args) + next(calls))

    results = generate(engine, admitted, slots, num_steps=3)

    assert [bool(rows[0].error) for rows in results] == [True] * 3
    assert [rows[0].token_ids for rows in results] == [b""] * 3
    assert [rows[1] for rows in results] == [rows[1] for rows in expected]


def test_a_row_lost_in_a_queued_step_is_lost_in_the_next_though_that_one_is_not_queued(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, (lost, other) = pair.queued, admits()[:2]
    penalized = msgspec.structs.replace(other, sampling=SamplingParams(presence_penalty=1.0))
    logits, calls = engine._decoder.logits, iter((torch.nan, 0.0))
    monkeypatch.setattr(engine._decoder, "logits", lambda *args: logits(*args) + next(calls))

    engine.launch(StepPlan(0, 0, (lost,), (Row(0, 3),)))
    engine.launch(StepPlan(0, 1, (penalized,), (Row(0, 1), Row(1, 8))))
    results = [engine.collect().rows for _ in range(2)]
    engine.step(StepPlan(0, 2, drop=pack_ints([0, 1])))

    assert [[bool(row.error) for row in rows] for rows in results] == [[True], [True, False]]

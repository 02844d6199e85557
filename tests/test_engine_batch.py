"""The tensors of a step: the source of every token, the cache slot of its key, and the rows that are sampled."""

from collections.abc import Sequence
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from descant.contract.plan import AdapterSpan, Admit, Row, pack_ints
from descant.engine import uploads
from descant.engine.batch import EngineRow, ForwardBatch
from descant_client.protocol import SamplingParams

PARAMS = SamplingParams(temperature=0.5)


def engine_row(row: int, tokens: list[int], blocks: list[int], num_prompt: int = 1, cached: int = 0) -> EngineRow:
    return EngineRow(
        Admit(row, pack_ints(tokens), num_prompt, cached, pack_ints(blocks), PARAMS, seed=9, choice=2, num_logprobs=4)
    )


def batch_of_three() -> ForwardBatch:
    """Rows 0 (no adapter, whole), 1 (adapter 3, cut off) and 2 (adapter 1, decoding), in blocks of 2 positions."""
    whole = engine_row(0, [10, 11, 12], [5, 6])
    cut_off = engine_row(1, [20, 21, 22, 23], [9, 8])
    decoding = engine_row(2, [30, 31, 32], [1, 0], cached=2)
    planned = [
        (whole, Row(0, 3)),
        (cut_off, Row(1, 2, (AdapterSpan(0, 3),))),
        (decoding, Row(2, 1, (AdapterSpan(0, 1),))),
    ]
    return ForwardBatch.of(planned, 2, torch.device("cpu"))


def test_rows_lie_by_adapter_and_those_without_one_last() -> None:
    batch = batch_of_three()
    assert [row.state.row for row in batch.rows] == [2, 1, 0]
    assert batch.input_ids.tolist() == [32, 20, 21, 10, 11, 12]
    assert batch.positions.tolist() == [2, 0, 1, 0, 1, 2]
    assert (batch.segments.host_indptr, batch.segments.host_slots) == ((0, 1, 3), (1, 3))


def test_keys_go_to_the_slots_of_the_rows_blocks() -> None:
    batch = batch_of_three()
    assert batch.slot_mapping.tolist() == [0, 18, 19, 10, 11, 12]
    assert batch.attention.block_tables.tolist() == [[1, 0], [9, 8], [5, 6]]
    assert (batch.attention.host_cu_seqlens_q, batch.attention.host_context_lens) == ((0, 1, 3, 6), (3, 2, 3))
    assert batch.attention.cu_seqlens_q.tolist() == [0, 1, 3, 6]


def test_only_rows_whose_last_known_token_is_computed_are_sampled() -> None:
    batch = batch_of_three()
    assert [row.state.row for row in batch.sampled_rows] == [2, 0]
    assert batch.sampled_tokens.tolist() == [0, 5]
    assert (batch.sampled_segments.host_indptr, batch.sampled_segments.host_slots) == ((0, 1), (1,))


def test_a_batch_without_adapters_has_no_segments() -> None:
    rows = [(engine_row(i, [1, 2], [i]), Row(i, 2)) for i in range(2)]
    batch = ForwardBatch.of(rows, 16, torch.device("cpu"))
    assert not batch.segments.has_adapter
    assert not batch.sampled_segments.has_adapter


def test_a_row_tells_sampling_where_it_is_and_what_was_said() -> None:
    row = engine_row(0, list(range(8)), [0], num_prompt=5)
    said = row.sampling_row()
    assert (said.output_index, list(said.prompt_ids), list(said.output_ids)) == (3, [0, 1, 2, 3, 4], [5, 6, 7])
    assert (said.params, said.seed, said.choice, said.num_logprobs) == (PARAMS, 9, 2, 4)


def test_a_row_keeps_all_its_tokens_however_many_there_come() -> None:
    row = engine_row(0, [7, 8], [0])
    for token_id in range(300):
        row.append_token(token_id)
    assert row.tokens(0, row.num_tokens).tolist() == [7, 8, *range(300)]
    assert row.sampling_row().output_index == 301


def test_a_batch_goes_to_the_device_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, transfers = batch_of_three(), list[int]()

    def transfer(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        transfers.append(len(tensors))
        packed, starts = uploads.pack(tensors)
        return uploads.unpack(packed, starts, tensors)

    monkeypatch.setattr(uploads, "_upload_packed", transfer)
    moved = batch.to(torch.device("meta"))

    assert transfers == [13]
    for old, new in ((batch, moved), (batch.attention, moved.attention), (batch.segments, moved.segments)):
        for field in fields(old):
            value, copy = getattr(old, field.name), getattr(new, field.name)
            if isinstance(value, Tensor):
                assert torch.equal(value, copy)
                assert value is not copy
    assert torch.equal(moved.sampled_segments.indptr, batch.sampled_segments.indptr)
    assert moved.sampled_segments.indptr is not batch.sampled_segments.indptr
    assert moved.sources is None

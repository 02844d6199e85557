"""A sequence takes tokens until something ends it."""

from typing import Any

from descant.contract.plan import LogprobRows, pack_floats, pack_ints
from descant.scheduling.sequence import Sequence, SequenceTable, TokenLogprobs, unpack_logprobs
from fakes import make_sequence


def sequence(**fields: Any) -> Sequence:
    prompt_ids: list[int] = fields.pop("prompt_ids", [1, 2, 3])
    stopper, token_limit = fields.pop("stopper", None), fields.pop("token_limit", 100)
    made = make_sequence(1, prompt_ids, **fields)
    made.stopper, made.device.token_limit = stopper, token_limit
    return made


class StopAfter:
    """Finds its stop string in token number `count`."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.num_tokens = 0

    def push(self, token_ids: list[int]) -> int | None:
        self.num_tokens += len(token_ids)
        return self.count if self.num_tokens >= self.count else None


def test_tokens_are_appended() -> None:
    seq = sequence()

    assert seq.append([5, 6]) == 2
    assert (seq.output_ids, seq.num_tokens, seq.is_finished) == ([5, 6], 5, False)


def test_a_stop_token_is_kept_and_ends_the_sequence() -> None:
    seq = sequence(stop_token_ids=frozenset({6}))

    assert seq.append([5, 6, 7]) == 2
    assert (seq.output_ids, seq.finish_reason, seq.is_ended_by_token) == ([5, 6], "stop", True)


def test_the_token_limit_counts_the_prompt() -> None:
    seq = sequence(token_limit=5)

    assert seq.append([5, 6, 7]) == 2
    assert (seq.finish_reason, seq.is_ended_by_token) == ("length", False)


def test_a_stop_string_truncates_to_the_token_that_completes_it() -> None:
    seq = sequence(stopper=StopAfter(3), num_logprobs=0)
    logprobs = [TokenLogprobs(i, -1.0) for i in range(4)]

    seq.append([5], logprobs[:1])
    assert seq.append([6, 7, 8], logprobs[1:]) == 2
    assert (seq.output_ids, seq.finish_reason, seq.is_ended_by_token) == ([5, 6, 7], "stop", False)
    assert seq.output.logprobs == logprobs[:3]


def test_a_stop_string_on_the_last_allowed_token_is_a_stop() -> None:
    seq = sequence(stopper=StopAfter(2), token_limit=5)

    seq.append([5, 6])

    assert seq.finish_reason == "stop"


def test_tokens_reads_across_prompt_and_output() -> None:
    seq = sequence()
    seq.output.token_ids = [4, 5]

    assert [seq.tokens(0, 2), seq.tokens(2, 4), seq.tokens(3, 5), seq.tokens(0, 5)] == [
        [1, 2],
        [3, 4],
        [4, 5],
        [1, 2, 3, 4, 5],
    ]


def test_logprobs_are_unpacked_per_token() -> None:
    rows = LogprobRows(2, 2, pack_floats([-1, -2]), pack_ints([7, 8, 9, 7]), pack_floats([-1, -3, -0.5, -2]))

    assert unpack_logprobs(rows, [7, 7]) == [
        TokenLogprobs(7, -1, ((7, -1), (8, -3))),
        TokenLogprobs(7, -2, ((9, -0.5), (7, -2))),
    ]


def test_prompt_logprobs_are_missing_until_the_last_position_has_one() -> None:
    seq = sequence(num_prompt_logprobs=0)
    assert seq.needs_prompt_logprobs

    seq.output.prompt_logprobs = [TokenLogprobs(2, -1.0), TokenLogprobs(3, -1.0)]
    assert not seq.needs_prompt_logprobs
    assert not sequence(num_prompt_logprobs=0, prompt_ids=[1]).needs_prompt_logprobs


def test_the_table_knows_the_choices_of_a_request() -> None:
    table = SequenceTable()
    first, second = (sequence(choice=choice) for choice in (0, 1))
    first.id, second.id = table.next_id(), table.next_id()
    table.add(first)
    table.add(second)

    table.remove(first)

    assert table.of_request("r") == [second]
    assert table.first_of_request("r") is second
    assert (table.get(first.id), len(table), list(table)) == (None, 1, [second])
    table.remove(second)
    assert table.of_request("r") == []


def test_ids_and_epochs_never_repeat() -> None:
    table = SequenceTable()

    assert len({table.next_id() for _ in range(5)}) == len({table.next_epoch() for _ in range(5)}) == 5

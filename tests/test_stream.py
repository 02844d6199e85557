"""A stream renders the tokens that its client has not received, from its sequences."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from descant.actor.errors import ActorFailed
from descant.model.tokenizer import Tokenizer
from descant.scheduling.sequence import Sequence, SequenceRequest, TokenLogprobs
from descant.sessions.outgoing import Outgoing, error_message
from descant.sessions.stream import BYTES_PER_TOKEN, MAX_DELTA_TOKENS, OutgoingStream
from descant_client.errors import AdapterNotFound, InternalError, InvalidRequest
from descant_client.protocol import Accepted, Delta, Done, Error, Progress, SamplingParams
from servers import END, save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return Tokenizer(directory)


class Told:
    """A stream with its sequences, and the number of its changes."""

    def __init__(self, tokenizer: Tokenizer, n: int = 1, budget: int = 1000, **fields: Any) -> None:
        self.num_changes = 0
        self.stream = OutgoingStream("r", "s/r", budget * BYTES_PER_TOKEN, self._changed)
        self.sequences = [
            Sequence(i, SequenceRequest("s/r", [1, 2], SamplingParams(), 7, self.stream, choice=i, **fields))
            for i in range(n)
        ]
        self.stream.expect(self.sequences, tokenizer)
        self.stream.accept(Accepted("r", 7, 2))

    def _changed(self, stream: Outgoing) -> None:
        self.num_changes += 1

    def say(self, text: str, choice: int = 0) -> bool:
        """Append the tokens of a text to a choice. Return whether there was room."""
        self.sequences[choice].output.token_ids += text.encode()
        return self.stream.put(self.sequences[choice], len(text.encode()))

    def finish(self, choice: int = 0) -> None:
        self.sequences[choice].output.finish_reason = "length"
        self.stream.end(self.sequences[choice])

    def rendered(self) -> list[object]:
        """Return all messages that the stream renders now."""
        messages: list[object] = []
        while part := self.stream.render():
            messages += part
        return messages


def _text(messages: list[object], choice: int = 0) -> str:
    deltas = [m.text for m in messages if isinstance(m, Delta) and m.choice == choice]
    ends = [end.text for m in messages if isinstance(m, Done) for end in m.choices if end.choice == choice]
    return "".join(deltas + ends)


def test_tokens_that_were_not_sent_yet_become_one_delta(tokenizer: Tokenizer) -> None:
    told = Told(tokenizer)
    told.say("ab")
    told.say("c")

    accepted, delta = told.rendered()

    assert accepted == Accepted("r", 7, 2)
    assert delta == Delta("r", 0, 0, "abc", [*b"abc"])
    assert told.rendered() == []


def test_a_backlog_comes_in_pieces_so_that_others_get_their_turn(tokenizer: Tokenizer) -> None:
    told = Told(tokenizer, budget=10_000)
    told.say("x" * (2 * MAX_DELTA_TOKENS + 1))
    changes = told.num_changes

    told.stream.render()

    assert told.num_changes == changes + 1  # it asks for another turn
    assert [m.index for m in told.rendered() if isinstance(m, Delta)] == [MAX_DELTA_TOKENS, 2 * MAX_DELTA_TOKENS]


def test_done_comes_once_and_last_with_what_was_held_back(tokenizer: Tokenizer) -> None:
    told = Told(tokenizer, n=2)
    told.say("a")
    told.sequences[1].output.token_ids += "é".encode()[:1]
    told.finish(0)
    assert not any(isinstance(message, Done) for message in told.rendered())
    told.finish(1)

    (done,) = told.rendered()

    assert isinstance(done, Done)
    assert [(end.choice, end.num_tokens, end.text) for end in done.choices] == [(0, 1, ""), (1, 1, "\ufffd")]
    assert told.rendered() == []


def test_a_stop_token_is_no_part_of_the_text(tokenizer: Tokenizer) -> None:
    told = Told(tokenizer, stop_token_ids=frozenset([ord("!")]))
    told.sequences[0].output.finish_reason = "stop"
    told.say("hi!")

    messages = told.rendered()

    assert _text(messages) == "hi"
    assert [m.token_ids for m in messages if isinstance(m, Delta)] == [[*b"hi!"]]


@given(st.data())
@settings(deadline=None)
def test_a_resumed_stream_says_the_rest_whatever_was_sent_before(tokenizer: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(st.text("aé€", min_size=1, max_size=20))
    told = Told(tokenizer, stop=("never",))
    for piece in text:
        told.say(piece)
        if data.draw(st.booleans()):
            told.stream.render()
    told.finish()
    if data.draw(st.booleans()):
        told.rendered()
    have = data.draw(st.integers(0, len(text.encode())))
    before = Told(tokenizer)
    before.sequences[0].output.token_ids += text.encode()[:have]

    told.stream.resume({0: have})
    rest = told.rendered()

    assert isinstance(rest[0], Accepted)
    assert [t for m in rest if isinstance(m, Delta) for t in m.token_ids] == [*text.encode()[have:]]
    assert _text(before.rendered()) + _text(rest) == text
    assert isinstance(rest[-1], Done)


@pytest.mark.parametrize("have", [{0: 3}, {1: 1}, {-1: 1}])
def test_nobody_can_have_more_than_there_is(tokenizer: Tokenizer, have: dict[int, int]) -> None:
    told = Told(tokenizer)
    told.say("ab")

    with pytest.raises(InvalidRequest, match="have"):
        told.stream.resume(have)


def test_a_stream_over_its_budget_parks_and_goes_on_when_half_of_it_was_sent(tokenizer: Tokenizer) -> None:
    told = Told(tokenizer, n=2, budget=4)

    assert told.say("ab", 0)
    assert told.say("cd", 1)
    assert not told.say("e", 0)
    assert told.stream.take_unparked() == ()
    told.stream.render()
    assert told.stream.take_unparked() == (0,)
    assert told.stream.take_unparked() == ()


def test_an_error_ends_the_stream_and_what_was_not_sent_is_not_sent(tokenizer: Tokenizer) -> None:
    told = Told(tokenizer)
    told.say("ab")
    told.stream.fail(AdapterNotFound("x"))
    told.stream.fail(InternalError("later"))

    (error,) = told.rendered()

    assert isinstance(error, Error)
    assert (error.code, error.request_id) == ("adapter_not_found", "r")
    assert told.stream.is_ended
    assert told.stream.is_end_rendered
    told.stream.resume({})
    assert told.rendered() == [error]


def test_a_sequence_that_fails_fails_its_stream(tokenizer: Tokenizer) -> None:
    told = Told(tokenizer)
    told.sequences[0].output.finish_reason = "error"
    told.sequences[0].output.error = InternalError("broken")
    told.stream.end(told.sequences[0])

    (error,) = told.rendered()

    assert isinstance(error, Error)
    assert "broken" in error.message


def test_progress_is_told_once_and_never_again(tokenizer: Tokenizer) -> None:
    stream = OutgoingStream("r", "s/r", 100, lambda stream: None)
    stream.note(Progress("r", "preparing_adapter"))

    assert stream.render() == [Progress("r", "preparing_adapter")]
    stream.resume({})
    assert stream.render() == []


def test_logprobs_come_with_their_tokens_and_name_special_ones(tokenizer: Tokenizer) -> None:
    told = Told(tokenizer, num_logprobs=1)
    told.sequences[0].output.logprobs = [TokenLogprobs(97, -0.5, ((END, -1.0),))]
    told.say("a")

    delta = told.rendered()[-1]

    assert isinstance(delta, Delta)
    assert delta.logprobs is not None
    assert (delta.logprobs[0].text, delta.logprobs[0].top[0].text) == ("a", "<|end|>")


def test_what_passes_between_actors_reaches_clients_as_a_fault_of_ours() -> None:
    error = error_message(ActorFailed("worker", "exit status 3"), "r")

    assert (error.code, error.request_id) == ("internal_error", "r")
    assert "exit status 3" in error.message

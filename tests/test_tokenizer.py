"""Text to ids and back: released text is never taken back, for any token borders."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from descant.model.tokenizer import Detokenizer, StopStrings, Tokenizer
from descant_client.errors import InvalidRequest, ModelInvalid
from descant_client.protocol import ChatMessage
from servers import ANSWER, BEGIN, END, save_tokenizer

# Of two bytes each: "th", the first two bytes of "é" alone, and halves of four-byte characters.
MERGES = [("t", "h"), ("Ã", "©"), ("ð", "Ł"), ("h", "e")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory, MERGES)
    return Tokenizer(directory)


def _pieces(tokenizer: Tokenizer, token_ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer, stop)
    return [*[detokenizer.push([token_id]) for token_id in token_ids], detokenizer.flush()], detokenizer


def test_a_prompt_is_wrapped_as_the_tokenizer_says_and_a_chat_as_its_template_says(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("abc") == [BEGIN, *b"abc", ANSWER]
    assert tokenizer.encode_chat([ChatMessage("user", "abc")]) == [BEGIN, *b"user: abc", ANSWER]


def test_special_and_unknown_ids_decode_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([BEGIN, 97, END, 98, 9_999]) == "ab"
    assert tokenizer.token_text(END) == "<|end|>"
    assert tokenizer.token_text(9_999) == ""


def test_text_comes_with_the_token_that_completes_it(tokenizer: Tokenizer) -> None:
    pieces, _ = _pieces(tokenizer, list("a€b".encode()))

    assert pieces == ["a", "", "", "€", "b", ""]


@given(text=st.text(), seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_the_pieces_of_any_text_make_the_text(tokenizer: Tokenizer, text: str, seed: int) -> None:
    token_ids = list(text.encode())
    for at in range(0, len(token_ids), 3):  # special tokens between any two bytes change nothing
        if (seed >> (at % 32)) & 1:
            token_ids.insert(at, BEGIN)

    pieces, detokenizer = _pieces(tokenizer, token_ids)

    assert "".join(pieces) == text
    assert detokenizer.num_tokens == len(token_ids)


@given(token_ids=st.lists(st.integers(0, 300), max_size=60))
@settings(deadline=None)
def test_any_ids_at_all_become_text_in_pieces_or_at_once(tokenizer: Tokenizer, token_ids: list[int]) -> None:
    pieces, _ = _pieces(tokenizer, token_ids)
    one_push = Detokenizer(tokenizer)
    at_once = one_push.push(token_ids) + one_push.flush()

    assert "".join(pieces) == at_once
    # For bytes that are no text, the number of replacement characters is unspecified.
    assert _collapsed(at_once) == _collapsed(tokenizer.decode(token_ids))


def _collapsed(text: str) -> str:
    return re.sub("\ufffd+", "\ufffd", text)


def test_a_run_of_bytes_that_are_no_text_is_not_held_back_forever(tokenizer: Tokenizer) -> None:
    pieces, _ = _pieces(tokenizer, [0xFF] * 100)

    assert len("".join(pieces[:50])) > 30


@given(
    text=st.text("abc€", max_size=30), stops=st.lists(st.text("abc€", min_size=1, max_size=4), min_size=1, max_size=3)
)
@settings(deadline=None)
def test_the_text_ends_where_the_first_complete_stop_string_begins(
    tokenizer: Tokenizer, text: str, stops: list[str]
) -> None:
    token_ids = list(text.encode())
    complete = [at for at in range(len(text) + 1) if any(text[:at].endswith(stop) for stop in stops)]

    pieces, detokenizer = _pieces(tokenizer, token_ids, tuple(stops))

    if not complete:
        assert ("".join(pieces), detokenizer.stopped_at) == (text, None)
    else:
        end = complete[0]
        begin = min(end - len(stop) for stop in stops if text[:end].endswith(stop))
        assert "".join(pieces) == text[:begin]
        assert detokenizer.stopped_at == len(text[:end].encode())


def test_what_may_begin_a_stop_string_is_held_back_and_given_out_at_the_end(tokenizer: Tokenizer) -> None:
    pieces, _ = _pieces(tokenizer, list(b"xaab"), ("aac", "b!"))

    assert pieces == ["x", "", "", "aa", "b"]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_stop_string_keeps_the_same_tokens_however_they_come(tokenizer: Tokenizer, size: int) -> None:
    token_ids = list(b"one two three")
    stopper = StopStrings(tokenizer, ["two"])

    answers = [stopper.push(token_ids[at : at + size]) for at in range(0, len(token_ids), size)]

    assert next(kept for kept in answers if kept is not None) == len("one two")


def test_a_template_that_refuses_is_an_invalid_request(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="no such role"):
        tokenizer.encode_chat([ChatMessage("refused", "x")])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].__init__.__globals__ }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ undefined.field }}",
        "{{ 1 / 0 }}",
        "{{ messages | no_such_filter }}",
    ],
)
def test_a_template_can_do_no_harm(tmp_path: Path, template: str) -> None:
    save_tokenizer(tmp_path, template=template)

    with pytest.raises((InvalidRequest, ModelInvalid)):
        Tokenizer(tmp_path).encode_chat([ChatMessage("user", "x")])


def test_templates_may_use_what_transformers_gives_them(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ bos_token }}{{ eos_token }}"
        "{{ m | tojson }}{{ strftime_now('%Y') | length }}{% endfor %}"
    )
    save_tokenizer(tmp_path, template=template)

    ids = Tokenizer(tmp_path).encode_chat([ChatMessage("user", "é"), ChatMessage("user", "no")])

    assert ids == [BEGIN, END, *'{"role": "user", "content": "é"}4'.encode()]


@pytest.mark.parametrize(
    "settings", [{"chat_template": None}, {"chat_template": [{"name": "rag", "template": "x"}]}, {}]
)
def test_a_model_without_a_template_refuses_chats(tmp_path: Path, settings: dict[str, Any]) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))

    with pytest.raises(InvalidRequest, match="send `prompt`"):
        Tokenizer(tmp_path).encode_chat([ChatMessage("user", "x")])


def test_a_template_file_precedes_the_configuration_and_named_templates_have_a_default(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer(tmp_path).encode_chat([ChatMessage("user", "x")]) == [*b"d"]

    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer(tmp_path).encode_chat([ChatMessage("user", "x")]) == [*b"file"]


@pytest.mark.parametrize("content", [None, "", "{}", "not json"])
def test_a_directory_without_a_readable_tokenizer_is_an_invalid_model(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)

    with pytest.raises(ModelInvalid, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_a_template_that_does_not_compile_is_an_invalid_model(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, template="{% if %}")

    with pytest.raises(ModelInvalid, match="template"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% if tools is not none or documents is not none %}no{% endif %}x", "x"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        ("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true) }}", '{"a":2,"b":1}'),
    ],
)
def test_templates_written_for_transformers_render_as_there(tmp_path: Path, template: str, text: str) -> None:
    save_tokenizer(tmp_path, template=template)

    assert Tokenizer(tmp_path).encode_chat([ChatMessage("user", "hi")]) == [*text.encode()]


@pytest.mark.parametrize("content", ["{", "[]", b"\xff"])
def test_an_unreadable_tokenizer_config_is_an_invalid_model(tmp_path: Path, content: str | bytes) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content.encode() if isinstance(content, str) else content)

    with pytest.raises(ModelInvalid, match=r"tokenizer_config\.json"):
        Tokenizer(tmp_path)

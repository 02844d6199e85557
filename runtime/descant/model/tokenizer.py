"""Conversion of text to token ids and back: prompts, chat templates, incremental detokenization, stop strings.

Used in the server process, so it does not import torch. A `Detokenizer` processes tokens one at a time, so the text
released after n tokens does not depend on the batches in which tokens arrive. This makes resuming a stream exact.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Never

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec
import tokenizers

from descant_client.errors import InvalidRequest, ModelInvalid
from descant_client.protocol import ChatMessage

REPLACEMENT = "\ufffd"  # the decoded text of an incomplete UTF-8 sequence
MAX_INCOMPLETE_IDS = 8


class Tokenizer:
    """The `tokenizer.json` and chat template of a model directory."""

    def __init__(self, directory: Path) -> None:
        """Load both from `directory`. Raises ModelInvalid without a readable tokenizer.json or a valid template."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as exc:
            raise ModelInvalid(str(directory), f"its tokenizer.json cannot be read: {exc}") from exc
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._text_by_id: dict[int, str] = {}
        self._plain_text_by_id: dict[int, str] = {}  # without special tokens
        self._template, self._template_variables = _load_chat_template(directory)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a raw prompt, with the special tokens that the tokenizer adds."""
        return self._tokenizer.encode(text, add_special_tokens=True).ids

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the ids of a conversation, ready for the assistant's turn.

        Raises:
            InvalidRequest: the model has no chat template, or its template refuses these messages.
        """
        if self._template is None:
            raise InvalidRequest("messages", "this model has no chat template; send `prompt` instead.")
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._template.render(messages=turns, add_generation_prompt=True, **self._template_variables)
        except Exception as exc:  # a template is a program and may raise any error
            raise InvalidRequest("messages", f"the chat template says: {exc}") from exc
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens; ids beyond the tokenizer decode to nothing."""
        if len(token_ids) != 1:
            return self._tokenizer.decode(token_ids, skip_special_tokens=True)
        text = self._plain_text_by_id.get(token_ids[0])
        if text is None:  # cached, because a single id is the context of nearly every token
            text = self._tokenizer.decode(token_ids, skip_special_tokens=True)
            self._plain_text_by_id[token_ids[0]] = text
        return text

    def token_text(self, token_id: int) -> str:
        """Return the text of one token; for a special token, its name."""
        text = self._text_by_id.get(token_id)
        if text is None:  # cached, because log-probabilities of a long prompt contain millions of tokens
            text = self._text_by_id[token_id] = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text


class Detokenizer:
    """An incremental decoder of ids. Released text is never taken back.

    Text is held back while a UTF-8 character is incomplete and while it may be the start of a stop string. A stop
    string itself is never released; `stopped_at` is then the number of tokens up to and including its last one.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._window: list[int] = []  # ids of released text for context, then ids with text that may still change
        self._context_len = 0  # number of context ids at the start of the window
        self._held = ""  # text that may be the start of a stop string
        self.num_tokens = 0
        self.stopped_at: int | None = None

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens and return the text that they release. Tokens after a stop string release nothing."""
        released = ""
        for token_id in token_ids:
            self.num_tokens += 1
            if self.stopped_at is None:
                released += self._release(self._complete(token_id))
        return released

    def flush(self) -> str:
        """Return the text still held back at the end of the output; empty after a stop string."""
        if self.stopped_at is not None:
            return ""
        context = self._tokenizer.decode(self._window[: self._context_len])
        rest = self._held + self._tokenizer.decode(self._window)[len(context) :]
        self._window, self._context_len, self._held = [], 0, ""
        return rest

    def _complete(self, token_id: int) -> str:
        # The text of an id depends on earlier ids (leading spaces, split characters), so ids are decoded in context.
        self._window.append(token_id)
        context = self._tokenizer.decode(self._window[: self._context_len])
        text = self._tokenizer.decode(self._window)
        if text == context:
            self._window.pop()  # a special or unknown id has no text
            return ""
        if text.endswith(REPLACEMENT):
            return self._give_up_on_invalid_bytes(context)
        self._window = self._window[self._context_len :]
        self._context_len = len(self._window)
        return text[len(context) :]

    def _give_up_on_invalid_bytes(self, context: str) -> str:
        # A character has at most four bytes, so only the last three ids of a longer run can still complete one.
        if len(self._window) - self._context_len <= MAX_INCOMPLETE_IDS:
            return ""
        head, self._window = self._window[:-3], self._window[-3:]
        self._context_len = 0
        return self._tokenizer.decode(head)[len(context) :]

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped_at = self.num_tokens
            released, self._held = self._held[: min(found)], ""
            return released
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        released = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return released


class StopStrings:
    """A search for stop strings in a sequence's output: the scheduler's `Stopper`."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer, stop)

    def push(self, token_ids: Sequence[int]) -> int | None:
        """Add output tokens. Return the number of output tokens to keep once a stop string is complete, else None."""
        self._detokenizer.push(token_ids)
        return self._detokenizer.stopped_at


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


def _load_chat_template(directory: Path) -> tuple[jinja2.Template | None, dict[str, Any]]:
    config = _read_json(directory / "tokenizer_config.json")
    template_file = directory / "chat_template.jinja"
    source = template_file.read_text("utf-8") if template_file.exists() else config.get("chat_template")
    if isinstance(source, list):  # named templates
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokens = {name: _token_content(config[name]) for name in names if config.get(name)}
    variables = {"tools": None, "documents": None, **tokens}  # templates compare these with none
    if not isinstance(source, str):
        return None, variables
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    try:
        return environment.from_string(source), variables
    except jinja2.TemplateError as exc:
        raise ModelInvalid(str(directory), f"its chat template does not compile: {exc}") from exc


class _GenerationTag(jinja2.ext.Extension):
    """The tag `{% generation %}`, which marks text to train on. Only its content is rendered."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's way

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _token_content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any]) if path.exists() else {}
    except (OSError, msgspec.DecodeError) as exc:
        raise ModelInvalid(str(path.parent), f"its {path.name} cannot be read: {exc}") from exc


def _raise_exception(message: str) -> Never:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return dt.datetime.now(tz=dt.UTC).astimezone().strftime(pattern)

"""Text to token ids and back: prompts, chat templates, incremental detokenization, stop strings.

Runs in the server process: no torch. A `Detokenizer` is a fold over tokens one at a time, so the text it has released
after n tokens never depends on how the tokens arrived; that is what makes resuming a stream exact.
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

REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to
MAX_INCOMPLETE_IDS = 8


class Tokenizer:
    """A model directory's `tokenizer.json` and chat template."""

    def __init__(self, directory: Path) -> None:
        """Load from `directory`. Raises ModelInvalid if there is no readable tokenizer.json."""
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
        """Return the ids of a raw prompt, with the special tokens the tokenizer adds by itself."""
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
        except Exception as exc:  # a template is a program: it may raise anything
            raise InvalidRequest("messages", f"the chat template says: {exc}") from exc
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens; ids beyond the tokenizer decode to nothing."""
        if len(token_ids) != 1:
            return self._tokenizer.decode(token_ids, skip_special_tokens=True)
        text = self._plain_text_by_id.get(token_ids[0])
        if text is None:  # one id is the context of nearly every token
            text = self._tokenizer.decode(token_ids, skip_special_tokens=True)
            self._plain_text_by_id[token_ids[0]] = text
        return text

    def token_text(self, token_id: int) -> str:
        """Return one token as text, special tokens by their name."""
        text = self._text_by_id.get(token_id)
        if text is None:  # log-probabilities of a long prompt name millions of tokens
            text = self._text_by_id[token_id] = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text


class Detokenizer:
    """Turns a growing list of ids into text that is never taken back.

    Text is held back while a UTF-8 character is incomplete and while it may be the beginning of a stop string. A stop
    string itself is never released; `stopped_at` is then the number of tokens up to and including its last one.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._window: list[int] = []  # the ids whose text may still change, after some context
        self._context_len = 0  # how many of them have been turned into text
        self._held = ""  # text that may begin a stop string
        self.num_tokens = 0
        self.stopped_at: int | None = None

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens release. Tokens after a stop string release nothing."""
        released = ""
        for token_id in token_ids:
            self.num_tokens += 1
            if self.stopped_at is None:
                released += self._release(self._complete(token_id))
        return released

    def flush(self) -> str:
        """Return what is still held back, at the end of the output; nothing after a stop string."""
        if self.stopped_at is not None:
            return ""
        context = self._tokenizer.decode(self._window[: self._context_len])
        rest = self._held + self._tokenizer.decode(self._window)[len(context) :]
        self._window, self._context_len, self._held = [], 0, ""
        return rest

    def _complete(self, token_id: int) -> str:
        # Decoding is not a homomorphism (leading spaces, split characters), so ids are decoded behind those before.
        self._window.append(token_id)
        context = self._tokenizer.decode(self._window[: self._context_len])
        text = self._tokenizer.decode(self._window)
        if text == context:
            self._window.pop()  # a special or unknown id: nothing to wait for
            return ""
        if text.endswith(REPLACEMENT):
            return self._give_up_on_invalid_bytes(context)
        self._window = self._window[self._context_len :]
        self._context_len = len(self._window)
        return text[len(context) :]

    def _give_up_on_invalid_bytes(self, context: str) -> str:
        # A character has at most four bytes: of a longer incomplete run only the last three ids may still become one.
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
    """Finds stop strings in a sequence's output: the scheduler's `Stopper`."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer, stop)

    def push(self, token_ids: Sequence[int]) -> int | None:
        """Take the next output tokens; return how many the whole output keeps once a stop string is complete."""
        self._detokenizer.push(token_ids)
        return self._detokenizer.stopped_at


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a proper beginning of `stop`."""
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
    """`{% generation %}` marks what to train on; for us it is not there."""

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

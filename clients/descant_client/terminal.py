"""Streams in a terminal: one printed as it arrives, several side by side, and a conversation."""

from __future__ import annotations

import asyncio
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.to_thread
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from descant_client.client import Client
from descant_client.errors import ConnectionLost, DescantError, Unauthorized
from descant_client.protocol import ChatMessage, Delta
from descant_client.stream import Result, Stream

_MIN_COLUMN_WIDTH = 24
_FRAME_S = 1 / 15
_GUESSED_STYLE = "bold green"
_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_HELP = """\
/adapter NAME  answer with this adapter; without NAME, with the base model
/adapters      list the adapters
/seed N        draw every answer with this seed; without N, with a new one each time
/new           forget the conversation
/help          this list
/quit          leave, as does Ctrl-D; Ctrl-C ends the answer being written"""


def printable(text: str) -> str:
    """Return text with its control characters made visible, so that a model's output cannot control the terminal."""
    return text.translate(_CONTROL)


async def print_stream(stream: Stream, console: Console, *, shows_speculation: bool = False) -> Result:
    """Print the first choice as it arrives and further choices after it, each below a line with its number.

    With `shows_speculation`, tokens accepted from drafts are colored, and a line at the end gives their number. This
    needs a request with `mark_guessed` and `logprobs`. Cancelling the call cancels the request.

    Raises:
        DescantError: the stream failed.
    """
    async for delta in stream:
        if delta.choice == 0 and shows_speculation:
            console.print(_marked(delta), end="", soft_wrap=True)
        elif delta.choice == 0:
            _write(console, delta.text)
    console.print()
    result = await stream.result()
    if shows_speculation:
        console.print(_saved(result), style="dim", highlight=False)
    for index, choice in enumerate(result.choices[1:], start=1):
        console.rule(f"choice {index}")
        _write(console, choice.text + "\n")
    return result


def _marked(delta: Delta) -> Text:
    """Return the text of a delta with its guessed tokens colored.

    A text that is not the concatenation of its tokens' texts is colored as a whole.
    """
    guessed, texts = set(delta.guessed or ()), [token.text for token in delta.logprobs or ()]
    if "".join(texts) != delta.text:
        return Text(printable(delta.text), style=_GUESSED_STYLE if guessed else "")
    marked = Text()
    for index, text in enumerate(texts, start=delta.index):
        marked.append(printable(text), style=_GUESSED_STYLE if index in guessed else "")
    return marked


def _saved(result: Result) -> str:
    timings = result.timings
    return (
        f"{result.usage.num_output_tokens} tokens, {timings.num_accepted} of them guessed: of {timings.num_drafted} "
        f"guesses in {timings.num_drafts} steps"
    )


def _write(console: Console, text: str) -> None:
    console.out(printable(text), end="", highlight=False)
    console.file.flush()


# ---- side by side -------------------------------------------------------------------------------------------------


class StatusLine:
    """The line below the columns of `side_by_side`; the last message is shown."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Add a message and show it in place of the one before."""
        self.messages.append(message)


async def side_by_side(
    voices: Sequence[tuple[str, Stream]],
    console: Console,
    *,
    status: StatusLine | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Result | DescantError]:
    """Show labeled streams in columns while they grow. Return the result or error of each, in the given order.

    On a console that is no terminal, print everything once at the end, without control codes. A stream that fails shows
    its error; the others go on. TTFT counts from this call. Cancelling the call cancels all requests.
    """
    status = status or StatusLine()
    columns = [_Voice(label, stream, clock) for label, stream in voices]
    with Live(console=console, auto_refresh=False, transient=True) as live:
        async with anyio.create_task_group() as group:
            if console.is_terminal:
                group.start_soon(_animate, live, columns, status)
            async with anyio.create_task_group() as readers:
                for voice in columns:
                    readers.start_soon(voice.read)
            group.cancel_scope.cancel()
    console.print(_grid(columns, console, max_height=None))
    for message in status.messages:
        console.print(printable(message), highlight=False, markup=False)
    return [voice.outcome for voice in columns if voice.outcome is not None]


class _Voice:
    """One column: the text of a stream so far, and the times of its tokens."""

    def __init__(self, label: str, stream: Stream, clock: Callable[[], float]) -> None:
        self.label = label
        self.outcome: Result | DescantError | None = None
        self._stream = stream
        self._clock = clock
        self._texts: list[str] = []
        self._num_tokens = 0
        self._num_first_tokens = 0  # in the first delta: they do not count in the rate
        self._began_s = self._first_token_s = self._last_token_s = clock()

    async def read(self) -> None:
        try:
            async for delta in self._stream:
                if delta.choice == 0:
                    self._on_delta(delta)
            self.outcome = await self._stream.result()
        except DescantError as exc:
            self.outcome = exc

    def _on_delta(self, delta: Delta) -> None:
        self._texts.append(printable(delta.text))
        if not delta.token_ids:
            return
        self._last_token_s = self._clock()
        if self._num_tokens == 0:
            self._first_token_s = self._last_token_s
            self._num_first_tokens = len(delta.token_ids)
        self._num_tokens += len(delta.token_ids)

    def footer(self) -> str:
        if isinstance(self.outcome, DescantError):
            return f"✗ {self.outcome.code}"
        if self._num_tokens == 0 and self.outcome is None:
            return f"… {self._stream.stage or 'waiting'}".replace("_", " ")
        mark = "…" if self.outcome is None else f"✓ {self.outcome.finish_reason} ·"
        footer = f"{mark} {self._num_tokens} tokens · TTFT {self._first_token_s - self._began_s:.2f} s"
        if self._last_token_s > self._first_token_s:
            rate = (self._num_tokens - self._num_first_tokens) / (self._last_token_s - self._first_token_s)
            footer += f" · {rate:.1f} tok/s"
        return footer

    def panel(self, console: Console, width: int, max_height: int | None) -> Panel:
        text = Text("".join(self._texts))
        if isinstance(self.outcome, DescantError):
            text.append(f"{self.outcome}", style="red")
        footer = Text(self.footer(), style="dim")
        if max_height is not None:  # a growing text shows its end
            inside = max(width - 4, 1)
            num_lines = max_height - 2 - len(footer.wrap(console, inside))
            text = Text("\n").join(text.wrap(console, inside)[-max(num_lines, 1) :])
        style = "dim" if self.outcome is None else "red" if isinstance(self.outcome, DescantError) else "green"
        title = Text(printable(self.label))
        return Panel(Group(text, footer), title=title, border_style=style, width=width, height=max_height)


async def _animate(live: Live, columns: Sequence[_Voice], status: StatusLine) -> None:
    while True:
        message = Text(printable(status.messages[-1]) if status.messages else "", style="yellow")
        grid = _grid(columns, live.console, max_height=live.console.height - 2)
        live.update(Group(grid, message), refresh=True)
        await anyio.sleep(_FRAME_S)


def _grid(voices: Sequence[_Voice], console: Console, max_height: int | None) -> RenderableType:
    """Lay columns out in as few rows as the width allows, within `max_height` lines if it is given."""
    num_columns = max(1, min(len(voices), console.width // _MIN_COLUMN_WIDTH))
    num_rows = math.ceil(len(voices) / num_columns)
    height = None if max_height is None else max(3, max_height // max(num_rows, 1))
    table = Table.grid()
    for start in range(0, len(voices), num_columns):
        row = voices[start : start + num_columns]
        table.add_row(*(voice.panel(console, console.width // num_columns, height) for voice in row))
    return table


# ---- conversation -------------------------------------------------------------------------------------------------


async def chat(
    client: Client,
    adapter: str | None = None,
    *,
    console: Console,
    is_plain: bool = False,
    read_line: Callable[[str], str] = input,
    **options: Any,
) -> None:
    """Converse until the user leaves, the connection is lost or the server refuses the token.

    `is_plain` sends each line as a prompt of its own, for base models without a chat template. `read_line` runs in a
    thread, may block, and raises EOFError at the end of the input. `options` are passed to `Client.generate`.
    """
    conversation = _Conversation(client, adapter, console, is_plain, options)
    console.print(f"{client.hello.model.id} at your service. /help lists the commands.", highlight=False, markup=False)
    while True:
        try:
            with on_interrupt(lambda: console.print("\nCtrl-D or /quit leaves.")):
                line = await anyio.to_thread.run_sync(read_line, conversation.prompt, abandon_on_cancel=True)
        except EOFError:
            console.print()
            return
        try:
            if line.startswith("/"):
                if not await conversation.run_command(line):
                    return
            elif line.strip():
                await conversation.answer(line)
        except DescantError as exc:
            console.print(Text(str(exc), style="red"))
            if isinstance(exc, ConnectionLost | Unauthorized):
                return


class _Conversation:
    """The messages so far, and the settings that commands change."""

    def __init__(
        self, client: Client, adapter: str | None, console: Console, is_plain: bool, options: dict[str, Any]
    ) -> None:
        self._client = client
        self._adapter = adapter
        self._console = console
        self._is_plain = is_plain
        self._options = options
        self._messages: list[ChatMessage] = []

    @property
    def prompt(self) -> str:
        return f"{self._adapter or 'base'}> "

    async def answer(self, line: str) -> None:
        """Print the answer to a line. Ctrl-C ends the answer; its text so far stays in the conversation."""
        messages = [*self._messages, ChatMessage("user", line)]
        stream = self._client.generate(line if self._is_plain else messages, adapter=self._adapter, **self._options)
        texts: list[str] = []
        with anyio.CancelScope() as scope, on_interrupt(scope.cancel):
            async for delta in stream:
                if delta.choice == 0:
                    texts.append(delta.text)
                    _write(self._console, delta.text)
        self._console.print()
        if scope.cancelled_caught:
            self._print_note("(ended)")
        else:
            result = await stream.result()
            num_tokens = len(result.token_ids)
            self._print_note(f"{num_tokens} tokens · TTFT {result.timings.ttft_s:.2f} s · seed {result.seed}")
        if texts:
            self._messages = [*messages, ChatMessage("assistant", "".join(texts))]

    async def run_command(self, line: str) -> bool:
        """Carry out a command. Return False for `/quit`, True otherwise."""
        command, _, argument = line.strip().partition(" ")
        match command:
            case "/quit":
                return False
            case "/adapter":
                await self._choose_adapter(argument.strip())
            case "/adapters":
                for adapter in await self._client.adapters.list():
                    self._console.print(printable(adapter.name), highlight=False, markup=False)
            case "/seed" if not argument or argument.isdecimal():
                self._options["seed"] = int(argument) if argument else None
            case "/seed":
                self._print_note("A seed is a whole number, 0 or more.")
            case "/new":
                self._messages = []
            case _:
                self._print_note(_HELP)
        return True

    async def _choose_adapter(self, name: str) -> None:
        is_reference = ":" in name or "/" in name  # only names are registered
        if name and not is_reference and await self._client.adapters.open(name) is None:
            self._print_note(f"No adapter {name!r}; /adapters lists them.")
        else:
            self._adapter = name or None

    def _print_note(self, message: str) -> None:
        self._console.print(Text(printable(message), style="dim"))


@contextmanager
def on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """Call `act` on the event loop at Ctrl-C, for the length of the block. Do nothing outside the main thread.

    Python handles signals in the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    previous = signal.signal(signal.SIGINT, lambda *_: loop.call_soon_threadsafe(act))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)

"""Streams in a terminal, and the conversation loop."""

import io
import os
import signal
from collections.abc import AsyncIterator, Callable

import anyio
import pytest
from rich.console import Console

from descant_client import Client, Result, connect
from descant_client.errors import AdapterNotFound
from descant_client.protocol import Cancel, ChatMessage, Delta, Generate, ServerMessage
from descant_client.terminal import StatusLine, _grid, _Voice, chat, print_stream, printable, side_by_side
from fake_server import FakeServer, text_of

pytestmark = pytest.mark.anyio


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with FakeServer() as server:
        yield server


@pytest.fixture
async def client(server: FakeServer) -> AsyncIterator[Client]:
    async with connect(server.uri) as client:
        yield client


def paper(*, is_terminal: bool = False) -> Console:
    """Return a console that writes to memory."""
    return Console(file=io.StringIO(), width=80, height=12, force_terminal=is_terminal)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines_of(*lines: str) -> Callable[[str], str]:
    """Return a function that reads these lines, then raises EOFError."""
    rest = iter(lines)

    def read_line(prompt: str) -> str:
        line = next(rest, None)
        if line is None:
            raise EOFError
        return line

    return read_line


def test_control_characters_are_made_visible() -> None:
    assert printable("a\x1b[2J\x7f\n\té") == "a␛[2J␡\n\té"


async def test_a_stream_is_printed_with_all_its_choices(client: Client) -> None:
    console = paper()
    result = await print_stream(client.generate([1, 2], n=2), console)
    assert written(console).startswith("1 2 \n")
    assert "choice 1" in written(console)
    assert "2 3 \n" in written(console)
    assert result.text == "1 2 "


async def test_voices_are_printed_once_where_there_is_no_terminal(client: Client) -> None:
    console, status = paper(), StatusLine()
    status.add("executor killed (pid 12)")
    voices = [("high", client.generate([1, 2])), ("low", client.generate([3, 4]))]
    outcomes = await side_by_side(voices, console, status=status)
    text = written(console)
    assert [outcome.text for outcome in outcomes if isinstance(outcome, Result)] == ["1 2 ", "3 4 "]
    assert "\x1b" not in text
    assert [text.count(part) for part in ("high", "low", "1 2", "3 4", "✓ stop", "pid 12")] == [1, 1, 1, 1, 2, 1]


async def test_a_voice_that_fails_disturbs_no_other(client: Client) -> None:
    console = paper()
    voices = [("bad", client.generate([1], adapter="nobody")), ("good", client.generate([3, 4]))]
    outcomes = await side_by_side(voices, console)
    assert isinstance(outcomes[0], AdapterNotFound)
    assert isinstance(outcomes[1], Result)
    assert "✗ adapter_not_found" in written(console)


async def test_voices_grow_on_a_terminal_within_its_height(client: Client) -> None:
    console = paper(is_terminal=True)
    await side_by_side([(f"voice {i}", client.generate([i] * 200)) for i in range(3)], console)
    first_frame = written(console).split("\r\x1b[2K")[0]
    assert "voice 0" in first_frame
    assert first_frame.count("\n") < console.height


async def test_a_text_too_long_for_its_panel_shows_its_end(client: Client) -> None:
    console = paper()
    voice = _Voice("long", client.generate([1000, *[0] * 500, 2000]), lambda: 0.0)
    await voice.read()
    console.print(_grid([voice], console, max_height=8))
    assert len(written(console).splitlines()) == 8
    assert "2000" in written(console)
    assert "1000" not in written(console)


async def test_a_rate_counts_the_tokens_after_the_first_delta(client: Client) -> None:
    ticks = iter(range(1000))
    console = paper()
    stream = client.generate(list(range(10)))
    await stream.result()
    deltas = [delta async for delta in stream if delta.token_ids]
    await side_by_side([("a", stream)], console, clock=lambda: float(next(ticks)))
    rate = (10 - len(deltas[0].token_ids)) / (len(deltas) - 1)
    assert f"TTFT 1.00 s · {rate:.1f} tok/s" in written(console)


async def test_more_voices_than_fit_take_more_rows(client: Client) -> None:
    console = paper()
    await side_by_side([(f"v{i}", client.generate([i])) for i in range(5)], console)
    titles = [line for line in written(console).splitlines() if "v0" in line or "v4" in line]
    assert len(titles) == 2


async def test_a_conversation_is_sent_as_it_grows(server: FakeServer, client: Client) -> None:
    await chat(client, "upper", console=paper(), read_line=lines_of("one", "two", "/new", "three"), temperature=0.0)
    requests = [message for message in server.received if isinstance(message, Generate)]
    answer = ChatMessage("assistant", text_of(list(b"chat")))
    first, second, third = (ChatMessage("user", text) for text in ("one", "two", "three"))
    assert [request.messages for request in requests] == [[first], [first, answer, second], [third]]
    assert {(request.adapter, request.sampling.temperature) for request in requests} == {("upper", 0.0)}


async def test_a_plain_conversation_sends_each_line_alone(server: FakeServer, client: Client) -> None:
    await chat(client, console=paper(), is_plain=True, read_line=lines_of("one", "two"))
    assert [message.prompt for message in server.received if isinstance(message, Generate)] == ["one", "two"]


async def test_commands_change_adapter_and_seed(server: FakeServer, client: Client) -> None:
    console = paper()
    commands = ["/adapters", "/adapter nobody", "/adapter reverse", "/seed 5", "a", "/seed x", "/adapter", "/seed", "b"]
    await chat(client, console=console, read_line=lines_of(*commands, "/help", "/quit", "never"))
    requests = [message for message in server.received if isinstance(message, Generate)]
    assert [(request.adapter, request.seed) for request in requests] == [("reverse", 5), (None, None)]
    for part in ("reverse\nupper\n", "No adapter 'nobody'", "whole number", "/adapter NAME"):
        assert part in written(console)


async def test_a_refused_line_does_not_end_the_conversation(server: FakeServer, client: Client) -> None:
    console = paper()
    await chat(client, "hub:no/body", console=console, read_line=lines_of("a", "/adapter upper", "b"))
    assert "No adapter 'hub:no/body'" in written(console)
    assert text_of(list(b"chat")) in written(console)


async def test_interrupting_an_answer_cancels_it_and_keeps_the_conversation() -> None:
    def interrupt(message: ServerMessage) -> list[ServerMessage | str | bytes]:
        if isinstance(message, Delta):
            os.kill(os.getpid(), signal.SIGINT)
        return [message]

    console, handler = paper(), signal.getsignal(signal.SIGINT)
    async with FakeServer(hold=1, tamper=interrupt) as server, connect(server.uri) as client:
        await chat(client, console=console, read_line=lines_of("a", "/quit"))
        await server.wait_for(lambda message: message == Cancel("1"))
    assert "(ended)" in written(console)
    assert signal.getsignal(signal.SIGINT) is handler


async def test_a_lost_connection_ends_the_conversation(server: FakeServer) -> None:
    console = paper()
    async with connect(server.uri, reconnect_s=0.0) as client:
        await server.stop()
        with anyio.fail_after(5):
            await chat(client, console=console, read_line=lines_of("a", "never"))
    assert "is lost" in written(console).replace("\n", " ")

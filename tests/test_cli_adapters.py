"""`descant adapter …` against a scripted server: what is asked for, and the one line that is printed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import pytest
from click.testing import CliRunner, Result

from descant.cli.app import cli, main
from descant_client.lifecycle import (
    Combination,
    CreateAdapter,
    DestroyAdapter,
    DisableAdapter,
    EnableAdapter,
    ForkAdapter,
    LoadAdapter,
    MergeAdapters,
    MergeAndSave,
    PinAdapter,
    SaveAdapter,
    UnpinAdapter,
)
from descant_client.protocol import Ack, Generate, OpenAdapter
from descant_client.wire import WeightedAdapter
from fake_catalog import digest_of
from fake_server import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A fake server in a thread of its own: a command runs its own event loop."""
    fake = FakeServer(token="key")
    is_up = threading.Event()
    with anyio.from_thread.start_blocking_portal() as portal:
        done = portal.call(anyio.Event)

        async def live() -> None:
            async with fake:
                is_up.set()
                await done.wait()

        future = portal.start_task_soon(live)
        assert is_up.wait(30.0)
        yield fake
        portal.call(done.set)
        future.result(30.0)


def run(server: FakeServer, *arguments: str) -> Result:
    """Run a command line against the server."""
    return CliRunner().invoke(cli, [*arguments, "--url", server.uri, "--token", "key"])


def _asked(server: FakeServer) -> list[Any]:
    return [one for one in server.received if not isinstance(one, Ack | OpenAdapter)]


MEMBERS = [WeightedAdapter("upper", 0.5), WeightedAdapter("reverse", 1.0)]
DIGEST = digest_of(1)  # of what is changed first
TIES = Combination("ties_svd", 4, 0.75, 0.5, "frequency", 7)


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("create new", CreateAdapter("1", "new")),
        (
            "create new --rank 4 --alpha 2 --target q_proj --target o_proj --shared",
            CreateAdapter("1", "new", 4, 2.0, ["q_proj", "o_proj"], True),
        ),
        ("load new org/repo --source hub --shared", LoadAdapter("1", "new", "org/repo", "hub", True)),
        ("load new here", LoadAdapter("1", "new", "here")),
        ("fork upper new --shared", ForkAdapter("2", "upper", "new", True)),
        ("save upper /out", SaveAdapter("2", "upper", "/out")),
        ("merge-and-save upper /out", MergeAndSave("2", "upper", "/out")),
        ("merge new upper=0.5 reverse", MergeAdapters("1", "new", MEMBERS)),
        (
            "merge new upper=0.5 reverse --type ties_svd --rank 4 --clamp 0.75 --density 0.5 --sign frequency --seed 7"
            " --source hub --shared",
            MergeAdapters("1", "new", MEMBERS, "hub", TIES, True),
        ),
        ("pin upper", PinAdapter("2", "upper")),
        ("unpin upper", UnpinAdapter("2", "upper")),
        ("enable upper", EnableAdapter("2", "upper")),
        ("disable upper", DisableAdapter("2", "upper")),
        ("destroy upper", DestroyAdapter("2", "upper")),
    ],
)
def test_a_command_asks_for_one_change_and_prints_one_line(server: FakeServer, line: str, asked: Any) -> None:
    result = run(server, "adapter", *line.split())

    assert (result.exit_code, _asked(server)) == (0, [asked]), result.output
    assert len(result.output.splitlines()) == 1
    assert result.output.startswith(getattr(asked, "new_name", asked.name))


def test_the_line_says_version_rank_bytes_and_marks(server: FakeServer) -> None:
    created = run(server, "adapter", "create", "new", "--rank", "16", "--shared").output
    pinned = run(server, "adapter", "pin", "new").output

    assert created == f"new · {DIGEST[:12]} · rank 16 · 1,024 bytes · shared\n"
    assert pinned.strip().endswith("shared, pinned")
    assert run(server, "adapter", "pin", "upper").output == "upper · not read yet · pinned\n"


def test_the_list_shows_what_the_names_are(server: FakeServer) -> None:
    run(server, "adapter", "load", "new", "[bold]odd[/]", "--shared")
    run(server, "adapter", "pin", "new")
    run(server, "adapter", "disable", "upper")

    lines = run(server, "adapter", "list").output.splitlines()

    (new,) = [line for line in lines if "new" in line]
    assert all(part in new for part in ("[bold]odd[/]", "16", "1024", DIGEST[:12], "shared, pinned"))
    assert "disabled" in next(line for line in lines if "upper" in line)


@pytest.mark.parametrize("text", ["upper=", "upper=x", "=0.5"])
def test_a_member_that_is_none_is_a_mistake_of_the_caller(server: FakeServer, text: str) -> None:
    result = run(server, "adapter", "merge", "new", text)

    assert (result.exit_code, server.received) == (2, [])
    assert "upper=0.5" in result.output


def test_a_path_with_an_equals_sign_keeps_it(server: FakeServer) -> None:
    run(server, "adapter", "merge", "new", "/a=b/c=0.5")

    assert _asked(server)[0].adapters == [WeightedAdapter("/a=b/c", 0.5)]


def test_a_relative_path_is_the_callers(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(server, "adapter", "load", "new", "./in")
    run(server, "adapter", "save", "new", "out")

    assert [one.ref if isinstance(one, LoadAdapter) else one.path for one in _asked(server)] == [
        str(tmp_path / "in"),
        str(tmp_path / "out"),
    ]


def test_generate_may_blend(server: FakeServer) -> None:
    result = run(server, "generate", "hi", "--blend", "upper=0.5", "--blend", "reverse")

    assert result.exit_code == 0
    (request,) = [one for one in server.received if isinstance(one, Generate)]
    assert (request.adapters, request.adapter) == (MEMBERS, None)


def test_an_error_is_one_sentence_and_status_one(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["descant", "adapter", "pin", "nobody", "--url", server.uri, "--token", "key"]
    monkeypatch.setattr("sys.argv", arguments)

    with pytest.raises(SystemExit) as caught:
        main()

    said = capsys.readouterr()
    assert (caught.value.code, said.out) == (1, "")
    assert said.err.startswith("adapter_not_found No adapter 'nobody' here.")
    assert len(said.err.splitlines()) == 1

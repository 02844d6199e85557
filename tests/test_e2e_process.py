"""`descant serve` as a process of its own: how it starts, how it ends, and what it leaves behind."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from descant_client import connect
from servers import Checkpoint, children_of, is_alive, wait_until

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")]

DESCANT = (sys.executable, "-c", "from descant.cli import main; main()")


class Served:
    """The process, the address it printed, and its children."""

    def __init__(self, process: subprocess.Popen[str], start: list[str], banner: str) -> None:
        self.process = process
        self.start = start  # the lines before the banner
        self.banner = banner
        self.uri = re.findall(r"ws://127\.0\.0\.1:\d+", banner)[0]
        self.children = children_of(process.pid)

    async def wait(self) -> int:
        """Return the exit status."""
        with anyio.fail_after(60):
            return await anyio.to_thread.run_sync(self.process.wait, abandon_on_cancel=True)


@contextmanager
def _served(data_dir: Path, *arguments: str) -> Iterator[Served]:
    command = (*DESCANT, "serve", "--port", "0", "--data-dir", str(data_dir), *arguments)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        start: list[str] = []
        for line in process.stderr:
            if "Descant at" in line:
                break
            start.append(line)
        yield Served(process, start, line)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run((*DESCANT, *arguments), capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_ends_with_status_zero_and_no_children(
    tmp_path: Path, signum: signal.Signals
) -> None:
    with _served(tmp_path, "--engine", "dummy") as served:
        async with connect(served.uri) as client:
            stream = client.generate("x", max_tokens=20)
            await wait_until(lambda: stream.seed is not None)
            served.process.send_signal(signum)
            result = await stream.result()

        assert len(result.token_ids) == 20
        assert len(served.children) == 1
        assert await served.wait() == 0
        assert not any(is_alive(child) for child in served.children)


async def test_a_second_signal_does_not_wait_for_streams(tmp_path: Path) -> None:
    with _served(tmp_path, "--engine", "dummy") as served:
        async with connect(served.uri, reconnect_s=0.0) as client:
            stream = client.generate("x")
            await wait_until(lambda: stream.seed is not None)
            served.process.send_signal(signal.SIGTERM)
            assert served.process.stderr is not None
            await anyio.to_thread.run_sync(served.process.stderr.readline)  # it says that it drains
            served.process.send_signal(signal.SIGTERM)

            assert await served.wait() == 0
    assert not any(is_alive(child) for child in served.children)


def test_health_names_the_children(tmp_path: Path, checkpoint: Checkpoint) -> None:
    with _served(tmp_path, str(checkpoint.base)) as served:
        with urllib.request.urlopen(served.uri.replace("ws", "http", 1) + "/health") as response:
            health = json.load(response)

        pids = {health["executor_pid"], health["worker_pid"], health["launcher_pid"]}
        assert pids == set(served.children)
        assert {health["executor_pid"], health["worker_pid"]} == set(children_of(health["launcher_pid"]))


def test_a_start_that_is_piped_names_each_stage_in_a_line(tmp_path: Path, checkpoint: Checkpoint) -> None:
    with _served(tmp_path, str(checkpoint.base)) as served:
        assert [line.rstrip() for line in served.start] == [
            "Starting: finding the model",
            "Starting: importing torch",
            "Starting: loading and packing the weights",
            "Starting: preparing the engine",
        ]
        assert served.banner.startswith("Descant at ws://127.0.0.1:")


async def test_a_killed_server_leaves_no_child(tmp_path: Path, checkpoint: Checkpoint) -> None:
    with _served(tmp_path, str(checkpoint.base), "--adapter", f"alpha={checkpoint.adapters['alpha']}") as served:
        async with connect(served.uri) as client:
            assert (await client.generate("x", adapter="alpha", max_tokens=3).result()).token_ids
        assert len(served.children) == 3

        served.process.kill()

        await wait_until(lambda: not any(is_alive(child) for child in served.children))


def test_the_banner_says_what_is_served_where_in_one_line(tmp_path: Path) -> None:
    with _served(tmp_path, "--engine", "dummy") as served:
        assert re.search(r"^Descant at ws://127\.0\.0\.1:\d+ · .+ · KV for [\d,]+ tokens · [\d.]+ s$", served.banner)


def test_a_server_that_cannot_start_says_why_in_a_sentence_and_ends_with_status_one(tmp_path: Path) -> None:
    outside = _run("serve", "--engine", "dummy", "--host", "0.0.0.0", "--data-dir", str(tmp_path))
    no_model = _run("serve", str(tmp_path), "--data-dir", str(tmp_path))

    assert (outside.returncode, no_model.returncode) == (1, 1)
    assert "descant key NAME" in outside.stderr.replace("\n", " ")
    assert "model_invalid" in no_model.stderr
    assert "Traceback" not in outside.stderr + no_model.stderr


def test_the_key_command_prints_lines_that_the_configuration_takes(tmp_path: Path) -> None:
    from descant.config import hash_key, load_config

    printed = _run("key", "ann").stdout
    (tmp_path / "descant.toml").write_text(printed)

    (key,) = load_config(tmp_path / "descant.toml").keys

    assert key.name == "ann"
    assert key.sha256 == hash_key(re.findall(r"dsc_\S+", printed)[0])

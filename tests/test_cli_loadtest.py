"""The command `descant loadtest`: options of a plan, several keys, a report in a file, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import msgspec
import pytest

from descant.cli.loadtest import loadtest
from descant.config import Config, KeyConfig, hash_key
from descant_client import connect
from descant_client.errors import ConfigInvalid
from descant_client.loadtest import decode_report
from servers import LONG, dummy_config, serve, wait_until

pytestmark = pytest.mark.anyio

DESCANT = (sys.executable, "-c", "from descant.cli import main; main()", "loadtest")
KEYS = ("--token", "key of ann", "--token", "key of bob")


def _with_keys(tmp_path: Path) -> Config:
    keys = [KeyConfig(name=name, sha256=hash_key(f"key of {name}")) for name in ("ann", "bob")]
    return msgspec.structs.replace(dummy_config(tmp_path), keys=keys)


async def _run_command(*arguments: str) -> tuple[int, str, str]:
    with anyio.fail_after(LONG):
        done = await anyio.run_process((*DESCANT, *arguments), check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


async def test_the_command_writes_a_result_that_names_no_key(tmp_path: Path) -> None:
    out, names = tmp_path / "result.json", tmp_path / "names"
    names.write_text("three\n\nfour\n")
    async with serve(_with_keys(tmp_path)) as (_, uri):
        status, text, noise = await _run_command(
            *("--url", uri, *KEYS, "--connections", "2", "--warmup", "4"),
            *("--rate", "inf", "--requests", "24", "--output-tokens", "5", "--prompt-tokens", "uniform:2:9"),
            *("--adapter", "one", "--adapters-from", str(names), "--distinct", "--out", str(out), "--records"),
        )

    report = decode_report(out.read_bytes())
    assert (status, noise) == (0, "")
    assert "20 of 20 measured requests completed" in text
    assert report.plan.adapters == ["one", "three", "four"]
    assert (report.summary.num_output_tokens, len(report.keys), report.workload.num_connections) == (100, 2, 4)
    assert report.records is not None
    assert len(report.records) == 24
    assert "key of" not in out.read_text() + text


async def test_the_command_takes_the_servers_adapters_that_fit(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    async with serve(dummy_config(tmp_path)) as (_, uri):
        some = ("--adapter-pattern", "r*", "--rate", "inf", "--requests", "3", "--out", str(out))
        status, _, noise = await _run_command("--url", uri, *some)
        refused, _, reason = await _run_command("--url", uri, "--adapter-pattern", "demo-*")

    assert (status, noise, refused) == (0, "", 1)
    assert decode_report(out.read_bytes()).plan.adapters == ["reverse", "rot13"]
    assert "fits none of the server's adapters (pig-latin, reverse, rot13, upper, base-heads)" in reason


async def test_of_several_keys_adapters_those_are_used_that_every_key_sees(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    async with serve(_with_keys(tmp_path)) as (_, uri):
        for key, names in (("key of ann", ("hers", "both")), ("key of bob", ("both", "his"))):
            async with connect(uri, key) as client:
                for name in names:
                    await client.adapters.create(name)
        options = ("--url", uri, *KEYS, "--rate", "inf", "--requests", "3", "--out", str(out))
        status, _, noise = await _run_command(*options)
        refused, _, reason = await _run_command(*options, "--adapter-pattern", "h*")

    assert (status, noise, refused) == (0, "", 1)
    demo = ["pig-latin", "reverse", "rot13", "upper", "base-heads"]
    assert decode_report(out.read_bytes()).plan.adapters == [*demo, "both"]
    assert "'h*' fits none of the server's adapters" in reason


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--output-tokens", "long"), "uniform:LOW:HIGH"),
        (("--rate", "1", "--concurrency", "1"), "either a rate"),
        (("--cv", "1", "--concurrency", "1"), "finite rate"),
        (("--cv", "2", "--rate", "inf"), "finite rate"),
        (("--warmup", "infs"), "seconds"),
        (("--temperature", "nan"), "no temperature"),
        (("--rate", "0"), "above 0"),
        (("--warmup", "soon"), "number of requests"),
        (("--warmup", "100"), "nothing is left"),
        (("--out", "/no/such/directory/result.json"), "no directory"),
        (("--prompts-from", os.devnull), "no lines"),
    ],
)
def test_the_command_says_what_is_right_before_it_connects(arguments: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigInvalid, match=reason):
        loadtest.main(arguments, standalone_mode=False)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
async def test_ctrl_c_ends_the_command_with_a_report_and_nothing_left_at_the_server(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    async with serve(dummy_config(tmp_path, tokens_per_s=20.0)) as (system, uri):
        arguments = ("--url", uri, "--rate", "inf", "--requests", "6", "--output-tokens", "4000", "--out", str(out))
        with anyio.fail_after(LONG):
            async with await anyio.open_process((*DESCANT, *arguments), stderr=subprocess.STDOUT) as process:
                await wait_until(lambda: len(system.services.sequences) == 6)
                process.send_signal(signal.SIGINT)
                assert await process.wait() == 130
        await wait_until(lambda: len(system.services.sequences) == 0)

    result = json.loads(out.read_text())
    assert result["is_complete"] is False
    assert result["summary"]["num_unfinished"] == result["summary"]["num_requests"] == 6

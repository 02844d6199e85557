"""`descant demo`, as its users run it: every voice sings to its end though the executor is killed in the middle."""

from __future__ import annotations

import os
import re
import sys

import anyio
import pytest

pytestmark = pytest.mark.anyio

VOICES = ["base", "pig-latin", "reverse", "rot13", "upper"]
TEXT = "the choir keeps singing while nobody looks"


async def test_the_demo_sings_in_every_voice_and_loses_none_when_its_executor_is_killed() -> None:
    command = [sys.executable, "-c", "from descant.cli import main; main()", "demo", "--prompt", TEXT]

    with anyio.fail_after(240):
        done = await anyio.run_process(command, check=False, env=os.environ | {"COLUMNS": "300"})

    shown = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert [name for name in VOICES if re.search(rf"─ {name} ─", shown)] == VOICES
    assert "base-heads" not in shown
    assert re.search(r"executor killed \(kill -9 \d+\) after 24 tokens of every voice", shown)
    assert re.search(r"a new executor \(pid \d+\) took over", shown)
    assert TEXT.upper() in shown
    assert shown.count("✓ stop") == len(VOICES)

"""`kill -9` at random moments: what was acknowledged is there, and of what was not, all or nothing."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import msgspec

from descant.catalog.entry import Entry, Key
from descant.catalog.journal import JournalFile

NUM_ROUNDS = 16
MAX_CHANGES = 200
WALK = Path(__file__).parent / "journal_walk.py"
Change = tuple[list[Entry], list[Key]]


def run_and_kill(directory: Path, seed: int) -> tuple[list[Change], bool]:
    """Let a child change names and kill it after some acknowledged changes; return what it said it would do, and
    whether the last of it was acknowledged."""
    rng = random.Random(seed)
    num_changes, num_bytes = rng.randrange(1, MAX_CHANGES), rng.randrange(400)
    command = [sys.executable, str(WALK), str(directory), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        lines: list[bytes] = []
        while lines.count(b"done\n") < num_changes:
            lines.append(child.stdout.readline())
            assert lines[-1], "it was to run until it is killed"
        rest = child.stdout.read(num_bytes)  # somewhere between two changes, or in one
        child.kill()
        rest += child.stdout.read()
    lines += rest.splitlines(keepends=True)
    begun = [line.removeprefix(b"begin ") for line in lines if line.startswith(b"begin ") and line.endswith(b"\n")]
    return [msgspec.json.decode(line, type=Change) for line in begun], lines[-1] == b"done\n"


def apply(state: dict[Key, Entry], change: Change) -> dict[Key, Entry]:
    puts, removed = change
    return {key: entry for key, entry in state.items() if key not in removed} | {e.key: e for e in puts}


def test_a_server_killed_at_any_moment_comes_back_with_every_acknowledged_change(tmp_path: Path) -> None:
    state: dict[Key, Entry] = {}
    num_unacknowledged = num_changes = 0
    for seed in range(NUM_ROUNDS):
        changes, is_last_done = run_and_kill(tmp_path, seed)
        acknowledged = changes if is_last_done else changes[:-1]
        for change in acknowledged:
            state = apply(state, change)
        journal = JournalFile(tmp_path, 4)
        found = {entry.key: entry for entry in journal.entries()}
        journal.close()

        allowed = [state] if is_last_done else [state, apply(state, changes[-1])]
        assert found in allowed
        assert all(
            Path(entry.version.path).read_text() == entry.version.digest for entry in found.values() if entry.version
        )
        state = found
        num_unacknowledged += not is_last_done
        num_changes += len(changes)

    assert num_unacknowledged, "some rounds end in the middle of a change"
    assert num_changes > NUM_ROUNDS

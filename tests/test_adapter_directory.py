"""Directories are written completely or not at all, and leftovers of killed writers are removed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from descant.adapters.directory import write_directory
from descant.versions.durable import ABANDONED_AFTER_S

KILL = """
import os, signal, sys
from pathlib import Path
from descant.adapters import directory

def fill(staging):
    (staging / "new").write_text("new")
    if sys.argv[2] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

rename, num_left = Path.rename, [int(sys.argv[2])]

def rename_or_die(path, target):
    rename(path, target)
    num_left[0] -= 1
    if num_left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)

Path.rename = rename_or_die
directory.write_directory(Path(sys.argv[1]), fill, [], lambda names: True)
"""


def write(target: Path, content: str) -> None:
    write_directory(target, lambda staging: _fill(staging, content), [], lambda names: True)


def _fill(staging: Path, content: str) -> None:
    (staging / "file").write_text(content)


def age(directory: Path, seconds: float) -> None:
    for path in (*directory.iterdir(), directory):
        os.utime(path, (time.time() - seconds,) * 2)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize("num_renames", [0, 1, 2], ids=["filling", "between the renames", "after them"])
def test_a_writer_killed_at_any_moment_leaves_the_old_or_the_new_and_the_next_one_clears_up(
    num_renames: int, tmp_path: Path
) -> None:
    write(tmp_path / "target", "old")

    command = [sys.executable, "-c", KILL, str(tmp_path / "target"), str(num_renames)]
    killed = subprocess.run(command, check=False, timeout=60)

    assert killed.returncode == -signal.SIGKILL
    found = {path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"old", "new"}
    for path in tmp_path.iterdir():
        age(path, ABANDONED_AFTER_S + 60)
    write(tmp_path / "target", "newer")
    assert names(tmp_path) == {"target"}
    assert (tmp_path / "target/file").read_text() == "newer"


def test_what_another_is_filling_and_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    others = {"." + "a" * 16 + ".descant-partial", ".x.descant-partial", "." + "b" * 16 + ".partial", "notes"}
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        age(tmp_path / name, 10 * ABANDONED_AFTER_S)
    os.utime(tmp_path / ("." + "a" * 16 + ".descant-partial") / "file")  # it is being written
    link = "." + "c" * 16 + ".descant-partial"
    (tmp_path / link).symlink_to(tmp_path / "notes")

    write(tmp_path / "target", "x")

    assert names(tmp_path) == {"target", link, *others}
    assert (tmp_path / "notes/file").exists()


def test_one_targets_leftovers_are_not_anothers(tmp_path: Path) -> None:
    write(tmp_path / "other", "old")
    command = [sys.executable, "-c", KILL, str(tmp_path / "other"), "1"]
    subprocess.run(command, check=False, timeout=60)

    write(tmp_path / "target", "x")

    assert [path.read_text() for path in tmp_path.glob(".*.descant-replaced/file")] == ["old"]

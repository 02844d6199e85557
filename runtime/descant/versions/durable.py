"""Files that survive a crash: syncing them, and removing those that a killed writer left unfinished."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

ABANDONED_AFTER_S = 3600.0
"""Age, in seconds, at which a temporary file or directory counts as left by a killed writer: no write takes so long."""


def remove_abandoned(paths: Iterable[Path]) -> None:
    """Remove temporary files and directories in which nothing has changed for `ABANDONED_AFTER_S`.

    Younger ones may belong to a server that is still writing. Errors are ignored: another server may remove the same
    paths, and the folder may belong to another user.
    """
    with contextlib.suppress(OSError):
        for path in paths:
            with contextlib.suppress(OSError):
                if time.time() - _changed_s(path) > ABANDONED_AFTER_S:
                    _remove(path)


def sync(path: Path) -> None:
    """Write a file or directory through to the disk. Raises OSError if that fails."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _changed_s(path: Path) -> float:
    """Return the time of the last change of a file, or of a directory and the entries in it."""
    entries = path.iterdir() if path.is_dir() else ()
    return max(entry.stat(follow_symlinks=False).st_mtime for entry in (path, *entries))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()

"""Atomic writing of a directory: under a temporary name beside the target, synced, then renamed.

An unusable target is an error of the request, not of the process. A killed writer leaves its temporary directory
behind. The next write beside it removes it, once nothing in it has changed for an hour.
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path

from safetensors import SafetensorError

from descant.versions.durable import remove_abandoned, sync
from descant_client.errors import InvalidRequest

_FIELD = "path"
_PARTIAL = re.compile(r"\.[0-9a-f]{16}\.descant-partial")  # a directory being filled
_REPLACED = ".descant-replaced"  # suffix of an old directory during its replacement

# Whether a directory that holds only files of these names may be replaced.
IsReplaceable = Callable[[Set[str]], bool]


def write_directory(
    target: Path, fill: Callable[[Path], None], kept: Sequence[Path], is_replaceable: IsReplaceable | None = None
) -> int:
    """Call `fill` on an empty directory, then rename that to `target`. Return the bytes of its files.

    Parents are created. An empty directory at `target` is replaced; one with files only if `is_replaceable` is true.
    Replacing takes two renames, between which `target` does not exist. A process killed between them leaves the old
    directory beside `target`, under a name that ends in `.descant-replaced`, until the next write to `target`.

    Args:
      kept: directories in which nothing may be written.

    Raises:
        InvalidRequest: the target is not allowed or cannot be written. Errors of `fill` are passed on. In either case
        the previous content of `target` is unchanged.
    """
    try:
        _check_place(target, kept)
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_replaceable(target, is_replaceable)
        remove_abandoned(_partial_directories(target.parent))
        with _staging_beside(target) as staging:
            fill(staging)
            num_bytes = _sync_files(staging)
            _check_replaceable(target, is_replaceable)  # again, because filling may take minutes
            _move(staging, target)
            sync(target.parent)
    except (OSError, SafetensorError) as exc:
        raise InvalidRequest(_FIELD, f"{target} cannot be written: {exc}.") from exc
    return num_bytes


def _check_place(target: Path, kept: Sequence[Path]) -> None:
    if not target.is_absolute() or "\0" in str(target):
        raise InvalidRequest(_FIELD, f"{str(target)!r} is no absolute path.")
    resolved = target.resolve()
    for directory in kept:
        if resolved.is_relative_to(directory.resolve()):
            raise InvalidRequest(_FIELD, f"{target} is in {directory}, which belongs to the server.")


def _check_replaceable(target: Path, is_replaceable: IsReplaceable | None) -> None:
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise InvalidRequest(_FIELD, f"{target} exists and is no directory.")
    with os.scandir(target) as found:
        entries = list(found)
    is_plain = all(entry.is_file(follow_symlinks=False) for entry in entries)
    names = {entry.name for entry in entries}
    if names and not (is_plain and is_replaceable is not None and is_replaceable(names)):
        raise InvalidRequest(_FIELD, f"{target} exists and holds {min(names)!r}; choose another path or empty it.")


@contextlib.contextmanager
def _staging_beside(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside `target`. It is removed at the end unless it was renamed."""
    path = target.parent / f".{secrets.token_hex(8)}.descant-partial"
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _partial_directories(parent: Path) -> Iterator[Path]:
    for path in parent.iterdir():
        if _PARTIAL.fullmatch(path.name) and path.is_dir():
            yield path


def _move(staging: Path, target: Path) -> None:
    old = target.parent / f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}{_REPLACED}"
    if not target.exists() or not any(target.iterdir()):
        staging.rename(target)  # replaces an empty directory
    else:  # a rename cannot replace a directory that contains files
        shutil.rmtree(old, ignore_errors=True)  # left by a writer that was killed after its second rename
        target.rename(old)
        try:
            staging.rename(target)
        except OSError:
            old.rename(target)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _sync_files(directory: Path) -> int:
    num_bytes = 0
    for path in directory.iterdir():
        sync(path)
        num_bytes += path.stat().st_size
    sync(directory)
    return num_bytes

"""`StoreIndex`: the versions in the store, and the choice of those to delete when it is full. Pure, except `scan`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

_FILE = re.compile(r"[0-9a-f]{64}\.safetensors")


class StoreIndex:
    """The versions in the store, least recently used first, and their bytes on disk."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._files: dict[str, tuple[Path, int]] = {}  # by digest

    def __contains__(self, digest: str) -> bool:
        return digest in self._files

    def __len__(self) -> int:
        return len(self._files)

    def add(self, digest: str, path: Path, num_bytes: int) -> None:
        """Add a file as the most recently used one. A known file may have a new size."""
        self.remove(digest)
        self._files[digest] = (path, num_bytes)
        self.num_bytes += num_bytes

    def touch(self, digest: str) -> None:
        """Make a version the most recently used one. An unknown one is ignored."""
        if digest in self._files:
            self._files[digest] = self._files.pop(digest)

    def remove(self, digest: str) -> Path | None:
        """Remove a file and return its path, None if it was unknown."""
        path, num_bytes = self._files.pop(digest, (None, 0))
        self.num_bytes -= num_bytes
        return path

    def victims(self, num_new_bytes: int, is_kept: Callable[[str], bool]) -> list[str] | None:
        """Return the digests to delete so that `num_new_bytes` fit. None: even all that are not kept do not suffice.

        The least recently used ones are chosen first. Of these, the ones that turn out unnecessary because a later one
        is large are spared, the most recently used first.
        """
        num_missing = self.num_bytes + num_new_bytes - self.max_bytes
        chosen: list[tuple[str, int]] = []
        for digest, (_, num_bytes) in self._files.items():
            if num_missing <= 0:
                break
            if not is_kept(digest):
                chosen.append((digest, num_bytes))
                num_missing -= num_bytes
        if num_missing > 0:
            return None
        victims: list[str] = []
        for digest, num_bytes in reversed(chosen):
            if num_missing + num_bytes <= 0:
                num_missing += num_bytes  # there is room without it
            else:
                victims.append(digest)
        return victims[::-1]


def scan(store_dir: Path) -> list[tuple[str, Path, int]]:
    """Return digest, path and bytes of every version in the store, the least recently written first. Blocking."""
    found: list[tuple[float, str, Path, int]] = []
    for path in store_dir.rglob("*.safetensors"):
        if _FILE.fullmatch(path.name):
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime, path.stem, path, status.st_size))
    return [(digest, path, num_bytes) for _, digest, path, num_bytes in sorted(found)]

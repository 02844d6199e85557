"""What is in the store and what may go when it is full: least recently used first, no more than needed. Pure but for
`scan`."""

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
        """Take note of a file, the most recently used one now; one known already may have another size."""
        self.remove(digest)
        self._files[digest] = (path, num_bytes)
        self.num_bytes += num_bytes

    def touch(self, digest: str) -> None:
        """The version is being used; an unknown one is no error."""
        if digest in self._files:
            self._files[digest] = self._files.pop(digest)

    def remove(self, digest: str) -> Path | None:
        """Forget a file and return where it was, if it was known."""
        path, num_bytes = self._files.pop(digest, (None, 0))
        self.num_bytes -= num_bytes
        return path

    def victims(self, num_new_bytes: int, is_kept: Callable[[str], bool]) -> list[str] | None:
        """Return what must go so that `num_new_bytes` more fit; None if what is not kept is too little.

        The least recently used go first, and of those only what is needed: if a late one is so large that earlier
        ones need not go as well, they stay.
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
                num_missing += num_bytes  # room enough without it
            else:
                victims.append(digest)
        return victims[::-1]


def scan(store_dir: Path) -> list[tuple[str, Path, int]]:
    """Return digest, file and size of every version in the store, the least recently written first. It blocks."""
    found: list[tuple[float, str, Path, int]] = []
    for path in store_dir.rglob("*.safetensors"):
        if _FILE.fullmatch(path.name):
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime, path.stem, path, status.st_size))
    return [(digest, path, num_bytes) for _, digest, path, num_bytes in sorted(found)]

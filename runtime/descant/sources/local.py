"""Directories of this machine, limited to allowed roots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from descant_client.errors import AdapterForbidden, AdapterNotFound


def find_adapter(adapter: str, path: str, roots: Sequence[str] | None) -> Path:
    """Return the real directory of an adapter; symbolic links are followed before the roots are checked.

    Raises:
        AdapterForbidden: it, or a file in it, is not below one of `roots` (None: no limit). Said before anything
            else, so that the answer does not tell what exists elsewhere.
        AdapterNotFound: there is no such directory.
    """
    try:
        directory = Path(path).expanduser().resolve()
        if roots is not None and not _is_below(directory, roots):
            raise AdapterForbidden(adapter, "its path is outside the roots this server allows you.")
        if not directory.is_dir():
            raise AdapterNotFound(adapter)
        if roots is not None and not all(_is_below(file.resolve(), roots) for file in directory.iterdir()):
            raise AdapterForbidden(adapter, "a file in it is a link to outside the roots this server allows you.")
    except (OSError, ValueError, RuntimeError) as exc:  # too long, NUL bytes, link loops, no such home
        raise AdapterNotFound(adapter) from exc
    return directory


def _is_below(path: Path, roots: Sequence[str]) -> bool:
    return any(path.is_relative_to(Path(root).expanduser().resolve()) for root in roots)

"""Directories of this machine, limited to allowed roots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from descant_client.errors import AdapterForbidden, AdapterNotFound


def find_adapter(adapter: str, path: str, roots: Sequence[str] | None) -> Path:
    """Return the real directory of an adapter; symbolic links are followed before the roots are checked.

    Raises:
        AdapterForbidden: it is not below one of `roots` (None: no limit). Said before anything else, so that the
            answer does not tell what exists elsewhere.
        AdapterNotFound: there is no such directory.
    """
    try:
        directory = Path(path).expanduser().resolve()
        if roots is not None and not any(directory.is_relative_to(Path(root).resolve()) for root in roots):
            raise AdapterForbidden(adapter, "its path is outside the roots this server allows you.")
        if not directory.is_dir():
            raise AdapterNotFound(adapter)
    except (OSError, ValueError, RuntimeError) as exc:  # too long, NUL bytes, link loops, no such home
        raise AdapterNotFound(adapter) from exc
    return directory

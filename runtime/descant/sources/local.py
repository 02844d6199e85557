"""Local directories, limited to allowed roots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from descant_client.errors import AdapterForbidden, AdapterNotFound, InvalidRequest


def find_adapter(adapter: str, path: str, roots: Sequence[str] | None) -> Path:
    """Return the real directory of an adapter. Symbolic links are followed before the roots are checked.

    Raises:
        AdapterForbidden: it, or a file in it, is not below one of `roots` (None: no limit). Checked first, so that the
            error does not reveal which paths exist elsewhere.
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
        str(directory).encode()
    except (OSError, ValueError, RuntimeError) as exc:  # too long, NUL bytes, no text, link loops, no such home
        raise AdapterNotFound(adapter) from exc
    return directory


def find_target(adapter: str, path: str, roots: Sequence[str] | None) -> Path:
    """Return the real path of a directory that is to be written. Existing parts of it are followed through links.

    Raises:
        InvalidRequest: it is no absolute path, or no path at all.
        AdapterForbidden: it is not below one of `roots` (None: no limit), whether it exists or not.
    """
    if not Path(path).is_absolute() or "\0" in path:
        raise InvalidRequest("path", "give an absolute path of the server's machine.")
    try:
        target = Path(path).resolve()
        str(target).encode()
        if roots is not None and not _is_below(target, roots):
            raise AdapterForbidden(adapter, "the path to write it to is outside the roots this server allows you.")
    except (OSError, ValueError, RuntimeError) as exc:  # too long, no text, link loops
        if roots is not None:
            reason = "the path to write it to cannot be shown to be inside the roots this server allows you."
            raise AdapterForbidden(adapter, reason) from exc
        raise InvalidRequest("path", "no file can have this path.") from exc
    return target


def _is_below(path: Path, roots: Sequence[str]) -> bool:
    return any(path.is_relative_to(Path(root).expanduser().resolve()) for root in roots)

"""The grammar of adapter references.

`hub:`, `s3:`, `local:`, `pbase:` or `s3://` name the source. A leading `/`, `./`, `../` or `~` means a local path, a
slash elsewhere the Hub. Anything else is a registered name.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from descant_client.errors import AdapterUnsupported, InvalidRequest

Source = Literal["name", "local", "hub", "s3", "pbase"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MAX_LENGTH = 4096
MAX_SHOWN = 200  # characters of an invalid name that the error of `check_name` repeats
SERVED: tuple[Source, ...] = ("name", "local")


class Reference(msgspec.Struct, frozen=True):
    """A parsed reference: its source, and the id there."""

    source: Source
    id: str


def parse_reference(text: str, source: str | None = None) -> Reference:
    """Parse a reference. An explicit `source` overrides the grammar.

    Raises:
        InvalidRequest: it is no reference.
        AdapterUnsupported: this version does not read adapters from its source.
    """
    if not text or len(text) > MAX_LENGTH or "\0" in text:
        raise InvalidRequest("adapter", f"a reference has 1 to {MAX_LENGTH} characters and no NUL.")
    reference = Reference(_SOURCES[source], text) if source else _by_grammar(text)
    if reference.source not in SERVED:
        raise AdapterUnsupported(text, f"the source {reference.source!r}; give a local path or a registered name")
    if reference.source == "name" and not NAME.fullmatch(text):
        raise InvalidRequest("adapter", f"{text!r} is neither a name ({NAME.pattern}) nor a reference.")
    return reference


def check_name(name: str) -> str:
    """Return `name` if it is a valid name of an adapter. Raises InvalidRequest."""
    if not NAME.fullmatch(name):
        raise InvalidRequest("name", f"{name[:MAX_SHOWN]!r} is no name of an adapter ({NAME.pattern}).")
    return name


_SOURCES: dict[str, Source] = {"local": "local", "hub": "hub", "s3": "s3", "pbase": "pbase"}


def _by_grammar(text: str) -> Reference:
    if text.startswith("s3://"):
        return Reference("s3", text)
    prefix, colon, rest = text.partition(":")
    if colon and prefix in _SOURCES:
        return Reference(_SOURCES[prefix], rest)
    if text.startswith(("/", "./", "../", "~")):
        return Reference("local", text)
    return Reference("hub", text) if "/" in text else Reference("name", text)

"""Conversion between an `Entry` and a row of the journal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from descant.catalog.entry import Entry
from descant.contract.version import AdapterVersion

SCHEMA_VERSION = 2
SCHEMA = """
CREATE TABLE adapters (
    owner TEXT NOT NULL, name TEXT NOT NULL, position INTEGER NOT NULL UNIQUE,
    source TEXT NOT NULL, reference TEXT, sources TEXT NOT NULL, configured TEXT,
    is_replaced INTEGER NOT NULL, is_pinned INTEGER NOT NULL, is_enabled INTEGER NOT NULL,
    digest TEXT, file TEXT, num_elements INTEGER, max_rank INTEGER, num_modules INTEGER, file_bytes INTEGER,
    num_heads INTEGER,
    PRIMARY KEY (owner, name),
    CHECK ((digest IS NULL) = (file IS NULL) AND (digest IS NULL) = (num_elements IS NULL))
) WITHOUT ROWID
"""
MIGRATIONS = {1: "ALTER TABLE adapters ADD COLUMN num_heads INTEGER"}
"""Statements by version: each makes a table of that version one of the next."""
_OF_NAME = (
    "owner",
    "name",
    "position",
    "source",
    "reference",
    "sources",
    "configured",
    "is_replaced",
    "is_pinned",
    "is_enabled",
)
_OF_VERSION = ("digest", "file", "num_elements", "max_rank", "num_modules", "file_bytes", "num_heads")
COLUMNS = (*_OF_NAME, *_OF_VERSION)


def to_row(entry: Entry, directory: Path, itemsize: int) -> tuple[Any, ...]:
    """Return an entry's values, in the order of COLUMNS. Paths below `directory` are made relative to it."""
    values = msgspec.structs.asdict(entry) | {"sources": msgspec.json.encode(entry.sources).decode()}
    version = entry.version
    if version is None:
        return (*(values[name] for name in _OF_NAME), *(None for _ in _OF_VERSION))
    path = Path(version.path)
    file = os.path.relpath(path, directory) if path.is_relative_to(directory) else str(path)
    num_elements = -(-version.num_bytes // itemsize)
    values |= msgspec.structs.asdict(version) | {"file": file, "num_elements": num_elements}
    return tuple(values[name] for name in COLUMNS)


def from_row(row: tuple[Any, ...], directory: Path, itemsize: int) -> Entry:
    """Return the entry of a row.

    Raises:
        ValueError: the row is not one of ours (msgspec's errors are ValueErrors).
    """
    values = dict(zip(COLUMNS, row, strict=True))
    version = None
    if values["digest"] is not None:
        version = AdapterVersion(
            digest=values["digest"],
            path=str(directory / values["file"]),
            num_bytes=values["num_elements"] * itemsize,
            max_rank=values["max_rank"],
            num_modules=values["num_modules"],
            file_bytes=values["file_bytes"],
            num_heads=values["num_heads"] or 0,  # null: journaled by version 1
        )
    fields = {name: values[name] for name in _OF_NAME} | {"sources": msgspec.json.decode(values["sources"])}
    flags = {name: bool(values[name]) for name in ("is_replaced", "is_pinned", "is_enabled")}
    return msgspec.convert(fields | flags | {"version": version}, Entry)

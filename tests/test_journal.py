"""The journal: what is put in comes back, what cannot be written changes nothing, and one server has it at a time."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from descant.catalog.entry import Entry
from descant.catalog.journal import FILE, JournalFile, open_journal
from descant.catalog.journal_rows import from_row, to_row
from descant.contract.version import AdapterVersion
from descant_client.errors import ConfigInvalid, InternalError

pytestmark = pytest.mark.anyio

STORE = Path("/data/store")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
COUNT = st.integers(0, 2**60)
VERSIONS = st.builds(
    AdapterVersion,
    digest=st.text("0123456789abcdef", min_size=64, max_size=64),
    path=st.sampled_from(["/data/store/versions/x", "/elsewhere/x", "/data/storeroom"]),
    num_bytes=st.integers(0, 2**50).map(lambda count: 4 * count),
    max_rank=COUNT,
    num_modules=COUNT,
    file_bytes=COUNT,
    num_heads=COUNT,
)
ENTRIES = st.builds(
    Entry,
    owner=TEXT,
    name=TEXT,
    position=COUNT,
    source=TEXT,
    reference=st.none() | TEXT,
    sources=st.lists(TEXT).map(tuple),
    configured=st.none() | TEXT,
    is_replaced=st.booleans(),
    version=st.none() | VERSIONS,
    is_pinned=st.booleans(),
    is_enabled=st.booleans(),
)


def entry(name: str, position: int, owner: str = "", digest: str | None = None) -> Entry:
    version = AdapterVersion(digest, f"/store/{digest}", 64, 8, 1, 100) if digest else None
    return Entry(owner=owner, name=name, position=position, source="local", version=version)


@given(ENTRIES)
def test_an_entry_is_a_row_and_back(entry: Entry) -> None:
    assert from_row(to_row(entry, STORE, 4), STORE, 4) == entry


def test_sizes_follow_the_dtype_and_files_the_directory(tmp_path: Path) -> None:
    before = AdapterVersion("d", str(tmp_path / "here/store/d"), 64, 8, 1)
    file = JournalFile(tmp_path / "here", 4)
    file.apply([msgspec.structs.replace(entry("a", 0), version=before)])
    file.close()
    (tmp_path / "here").rename(tmp_path / "there")

    file = JournalFile(tmp_path / "there", 2)
    version = file.entries()[0].version
    file.close()

    assert version == msgspec.structs.replace(before, path=str(tmp_path / "there/store/d"), num_bytes=32)


def test_changes_are_there_after_reopening_in_order_of_registration(tmp_path: Path) -> None:
    file = JournalFile(tmp_path, 4)
    file.apply([entry("b", 1, digest="x"), entry("a", 2, "anna"), entry("a", 0)])
    file.apply([entry("b", 1, digest="y")])
    file.apply([entry("c", 2)], [("anna", "a"), ("anna", "unknown")])
    file.close()

    file = JournalFile(tmp_path, 4)
    assert file.entries() == [entry("a", 0), entry("b", 1, digest="y"), entry("c", 2)]
    file.close()


def test_a_change_that_cannot_be_written_leaves_all_as_it_was(tmp_path: Path) -> None:
    file = JournalFile(tmp_path, 4)
    file.apply([entry("a", 0)])

    with pytest.raises(InternalError, match="journal"):
        file.apply([entry("b", 1), entry("c", 1)], [("", "a")])  # two of one position

    assert file.entries() == [entry("a", 0)]
    file.apply([entry("b", 1)])
    file.close()


async def test_one_server_at_a_time(tmp_path: Path) -> None:
    async with open_journal(tmp_path, 4) as journal:
        with pytest.raises(ConfigInvalid, match="another server uses it"):
            async with open_journal(tmp_path, 4):
                pass
        await journal.apply([entry("a", 0)])
    async with open_journal(tmp_path, 4) as journal:
        assert await journal.entries() == [entry("a", 0)]


def _spoil(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(statement)
    connection.close()


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("UPDATE schema SET version = 3", r"version 3.*Start the server it was written by"),
        ("UPDATE adapters SET sources = 'no list'", "damaged"),
        ("DROP TABLE adapters", "no such table"),
    ],
)
def test_a_journal_that_is_not_to_be_read_says_what_to_do(tmp_path: Path, statement: str, reason: str) -> None:
    file = JournalFile(tmp_path, 4)
    file.apply([entry("a", 0)])
    file.close()
    _spoil(tmp_path / FILE, statement)

    for _ in range(2):  # the refusal holds no lock
        with pytest.raises(ConfigInvalid, match=reason):
            JournalFile(tmp_path, 4)


def test_a_journal_from_before_there_were_draft_heads_is_read_and_kept_as_one_of_now(tmp_path: Path) -> None:
    file = JournalFile(tmp_path, 4)
    file.apply([entry("a", 0, digest="x"), entry("b", 1)])
    file.close()
    _spoil(tmp_path / FILE, "ALTER TABLE adapters DROP COLUMN num_heads")
    _spoil(tmp_path / FILE, "UPDATE schema SET version = 1")

    for name in ("c", "d"):
        file = JournalFile(tmp_path, 4)
        before = file.entries()
        file.apply([entry(name, len(before), digest="y")])
        file.close()

    assert before == [entry("a", 0, digest="x"), entry("b", 1), entry("c", 2, digest="y")]


def test_a_file_that_is_no_journal_is_damaged_and_a_file_in_the_way_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"not a database" * 1000)
    with pytest.raises(ConfigInvalid, match="move it away"):
        JournalFile(tmp_path, 4)
    with pytest.raises(ConfigInvalid, match="cannot be used"):
        JournalFile(tmp_path / FILE, 4)


def test_a_page_gone_bad_is_noticed_at_the_start(tmp_path: Path) -> None:
    file = JournalFile(tmp_path, 4)
    file.apply([entry(f"name{index}", index, digest=f"{index:064}") for index in range(200)])
    file.close()
    content = bytearray((tmp_path / FILE).read_bytes())
    content[-4096:] = b"\xff" * 4096
    (tmp_path / FILE).write_bytes(content)

    with pytest.raises(ConfigInvalid, match="damaged"):
        JournalFile(tmp_path, 4)

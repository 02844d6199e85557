"""The journal: every registered name in one SQLite file, so that a killed server starts again with them.

Each change is one transaction, durable before it is answered (WAL, `synchronous=FULL`). After a kill at any moment a
name is as it was before or after the change. One server holds the file at a time. The connection lives on a thread of
its own. Cancelling a wait for it does not undo its work.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from descant.catalog.entry import Entry, Key
from descant.catalog.journal_rows import COLUMNS, MIGRATIONS, SCHEMA, SCHEMA_VERSION, from_row, to_row
from descant_client.errors import ConfigInvalid, InternalError

logger = logging.getLogger(__name__)

FILE = "journal.sqlite"
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_PUT = (
    f"INSERT INTO adapters ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))}) "
    f"ON CONFLICT (owner, name) DO UPDATE SET {', '.join(f'{column} = excluded.{column}' for column in COLUMNS)}"
)
_REMOVE = "DELETE FROM adapters WHERE owner = ? AND name = ?"
ResultT = TypeVar("ResultT")


class JournalFile:
    """The file. Synchronous; used from one thread."""

    def __init__(self, directory: Path, itemsize: int) -> None:
        """Open or create the journal in `directory`, and create the directory if it does not exist.

        `itemsize` is the size of an element on the device, in bytes. Sizes there are journaled in elements, as the
        dtype may be another at the next start. Paths are journaled relative to `directory`. A journal of an older
        version is migrated.

        Raises:
            ConfigInvalid: another server uses it, it is damaged, of a newer version, or cannot be written.
        """
        self._directory = directory
        self._itemsize = itemsize
        self._path = directory / FILE
        with self._refusing():
            directory.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self._path, timeout=0, isolation_level=None)
        try:
            with self._refusing():
                self._begin_use()
        except BaseException:
            self._connection.close()
            raise

    def entries(self) -> list[Entry]:
        """Return every name, in order of registration."""
        rows = self._connection.execute(f"SELECT {', '.join(COLUMNS)} FROM adapters ORDER BY position")
        return [from_row(row, self._directory, self._itemsize) for row in rows]

    def apply(self, puts: Iterable[Entry], removed: Iterable[Key] = ()) -> None:
        """Remove and put entries in one transaction, which is on disk when this returns.

        Raises:
            InternalError: the file could not be written; nothing has changed.
        """
        rows = [to_row(entry, self._directory, self._itemsize) for entry in puts]
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.executemany(_REMOVE, list(removed))
                self._connection.executemany(_PUT, rows)
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # SQLite may have rolled back by itself
                    self._connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as exc:
            raise InternalError(f"the journal {self._path} cannot be written: {exc}") from exc

    def close(self) -> None:
        """Close the file. Another server may open it then."""
        self._connection.close()

    def _begin_use(self) -> None:
        connection = self._connection
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")  # before WAL: then no shared memory is needed
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("BEGIN IMMEDIATE")  # takes the lock, which is kept until the file is closed
        connection.execute("CREATE TABLE IF NOT EXISTS schema (version INTEGER NOT NULL)")
        found = connection.execute("SELECT version FROM schema").fetchone()
        if found is None:
            connection.execute("INSERT INTO schema VALUES (?)", (SCHEMA_VERSION,))
            connection.execute(SCHEMA)
        version = SCHEMA_VERSION if found is None else found[0]
        while version in MIGRATIONS:
            connection.execute(MIGRATIONS[version])
            version += 1
            connection.execute("UPDATE schema SET version = ?", (version,))
        connection.execute("COMMIT")
        if version != SCHEMA_VERSION:
            reason = f"{self._path} is of version {version}, this server reads {SCHEMA_VERSION}. Start the server it "
            raise ConfigInvalid("data_dir", reason + "was written by, or give another directory.")
        if (health := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(health)
        self.entries()  # every row can be read

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode & 0xFF in _BUSY:
                reason = f"{self._path}: another server uses it. Stop that one, or give this one another directory."
                raise ConfigInvalid("data_dir", reason) from exc
            raise ConfigInvalid("data_dir", f"{self._path} cannot be used: {exc}.") from exc
        except OSError as exc:
            raise ConfigInvalid("data_dir", f"{self._directory} cannot be used: {exc.strerror}.") from exc
        except (sqlite3.Error, ValueError) as exc:
            reason = f"{self._path} is damaged ({exc}). Put a copy of it in its place, or move it away: the server "
            raise ConfigInvalid("data_dir", reason + "then starts without the names that were in it.") from exc


class Journal:
    """The journal on its thread, made by `open_journal`. It outlives every life of the registry."""

    def __init__(self, file: JournalFile, thread: ThreadPoolExecutor) -> None:
        self._file = file
        self._thread = thread

    async def entries(self) -> list[Entry]:
        """Return every name, in order of registration, after all changes requested before."""
        return await self._run(self._file.entries)

    async def apply(self, puts: Iterable[Entry], removed: Iterable[Key] = ()) -> None:
        """Remove and put entries in one transaction, which is on disk when this returns. Raises InternalError.

        Cancelling does not undo it.
        """
        await self._run(self._file.apply, tuple(puts), tuple(removed))

    async def _run(self, work: Callable[..., ResultT], *args: object) -> ResultT:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)


@asynccontextmanager
async def open_journal(directory: Path, itemsize: int) -> AsyncIterator[Journal]:
    """Open the journal of a directory for the block. Raises ConfigInvalid, as `JournalFile`."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1, "journal") as thread:
        file = await loop.run_in_executor(thread, JournalFile, directory, itemsize)
        try:
            yield Journal(file, thread)
        finally:
            thread.submit(file.close)  # after every requested change; leaving the block waits for it

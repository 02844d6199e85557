"""A child process of `test_journal_kill`: changes names at random, saying before each change what it will do and after
it that it is done, until it is killed.

    python journal_walk.py DIRECTORY SEED
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import msgspec

from descant.catalog.catalog import Catalog
from descant.catalog.entry import Entry
from descant.catalog.journal import JournalFile
from descant.contract.principal import Principal
from descant.contract.version import AdapterVersion
from descant_client.errors import DescantError

NAMES = [f"n{index}" for index in range(12)]
PRINCIPALS = [Principal("anna"), Principal("bert"), Principal("admin", is_admin=True)]


def walk(directory: Path, seed: int) -> None:
    """Change names for as long as the process lives."""
    rng = random.Random(seed)
    journal = JournalFile(directory, 4)
    catalog = Catalog(journal.entries())
    say = msgspec.json.Encoder().encode
    while True:
        try:
            puts, removed = _step(rng, catalog, directory)
        except DescantError:
            continue
        _tell(b"begin " + say([puts, removed]))
        journal.apply(puts, removed)
        _tell(b"done")
        for key in removed:
            catalog.remove(key)
        for entry in puts:
            catalog.put(entry)


def _tell(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def _step(rng: random.Random, catalog: Catalog, directory: Path) -> tuple[list[Entry], list[tuple[str, str]]]:
    principal, name = rng.choice(PRINCIPALS), rng.choice(NAMES)
    match rng.choice(["create", "load", "load", "mark", "destroy", "fork"]):
        case "create":
            owner, name = catalog.new_key(principal, name, is_shared=rng.random() < 0.3)
            return [Entry(owner=owner, name=name, position=catalog.next_position, source="create")], []
        case "load":
            key = catalog.target_key(principal, name, is_shared=rng.random() < 0.3)
            entry = catalog.get(key) or Entry(owner=key[0], name=name, position=catalog.next_position, source="local")
            return [msgspec.structs.replace(entry, version=_write_version(rng, directory))], []
        case "fork":
            entry = catalog.require(principal, name)
            owner, name = catalog.new_key(principal, rng.choice(NAMES), is_shared=False)
            position = catalog.next_position
            return [msgspec.structs.replace(entry, owner=owner, name=name, position=position, is_pinned=False)], []
        case "mark":
            entry = catalog.require_owned(principal, name)
            flags = {"is_pinned": rng.random() < 0.5, "is_enabled": rng.random() < 0.5}
            return [msgspec.structs.replace(entry, **flags)], []
        case _:
            return [], [catalog.require_owned(principal, name).key]


def _write_version(rng: random.Random, directory: Path) -> AdapterVersion:
    digest = f"{rng.getrandbits(256):064x}"
    path = directory / "store" / f"{digest}.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(digest.encode())
    return AdapterVersion(digest, str(path), rng.randrange(1000) * 4, rng.randrange(64), 1, 64)


if __name__ == "__main__":
    walk(Path(sys.argv[1]), int(sys.argv[2]))

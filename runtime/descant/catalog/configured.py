"""Merging of configured adapters into the journal's names when a server starts. Pure.

Configured adapters are shared names. Their content is read again after each start, at first use. Content that a client
put under a configured name stays as long as the configured reference is the same as then. Pins and the enabled flag
belong to the name and stay while it is configured. A configured name that a client destroyed is registered again at the
next start. A name that is no longer configured is removed, unless a client has put other content under it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from descant.catalog.catalog import Catalog
from descant.catalog.entry import SHARED, Entry, Key
from descant.config import AdapterEntry
from descant.sources.grammar import parse_reference
from descant_client.errors import ConfigInvalid, DescantError


def reconcile(entries: Iterable[Entry], configured: Sequence[AdapterEntry]) -> tuple[list[Entry], list[Key]]:
    """Return the entries to put into the journal and the keys to remove from it.

    Raises:
        ConfigInvalid: a configured reference is invalid, or of a source that is not served.
    """
    catalog = Catalog(entries)
    names = {item.name for item in configured}
    removed = [entry.key for entry in catalog if _is_left_over(entry, names)]
    changed: list[Entry] = []
    for item in configured:
        before = catalog.get((SHARED, item.name))
        if before is not None and before.is_replaced and before.configured == item.ref:
            continue
        changed.append(_as_configured(item, before, catalog.next_position))
        catalog.put(changed[-1])
    return changed, removed


def _is_left_over(entry: Entry, names: set[str]) -> bool:
    is_gone = entry.configured is not None and entry.name not in names
    return is_gone and entry.owner == SHARED and not entry.is_replaced


def _as_configured(item: AdapterEntry, before: Entry | None, position: int) -> Entry:
    try:
        source = parse_reference(item.ref).source
    except DescantError as error:
        raise ConfigInvalid("adapters.entries", f"{item.name}={item.ref}: {error}") from error
    entry = before or Entry(owner=SHARED, name=item.name, position=position, source=source)
    return msgspec.structs.replace(
        entry,
        source=source,
        reference=item.ref,
        sources=(f"operator:{item.ref}",),
        configured=item.ref,
        is_replaced=False,
        version=None,
    )

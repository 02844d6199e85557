"""The rules of names, against a model of plain dictionaries."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from descant.catalog.catalog import Catalog
from descant.catalog.entry import SHARED, Entry
from descant.contract.principal import Principal
from descant.contract.version import AdapterVersion
from descant_client.errors import AdapterExists, AdapterForbidden, AdapterNotFound, DescantError, InvalidRequest

OWNERS = ("anna", "bert", "")  # a principal may have the shared owner's name
PRINCIPALS = st.builds(Principal, name=st.sampled_from(OWNERS), is_admin=st.booleans())
NAMES = st.sampled_from(["a", "b", "c", "-no name"])
DIGESTS = st.sampled_from(["d1", "d2", "d3"])


def version(digest: str) -> AdapterVersion:
    return AdapterVersion(digest, f"/store/{digest}", 64, 8, 1)


class CatalogAgainstDictionaries(RuleBasedStateMachine):
    """Model: own names in one dictionary per principal, shared ones in another. Both must give the same answers."""

    def __init__(self) -> None:
        super().__init__()
        self.catalog = Catalog()
        self.own: dict[str, dict[str, tuple[int, str]]] = {owner: {} for owner in OWNERS}  # position, digest
        self.num_made = 0

    @property
    def shared(self) -> dict[str, tuple[int, str]]:
        return self.own[SHARED]

    def ask(self, question: Any, *args: Any, **options: Any) -> Any:
        """Return the answer, or the class of the refusal."""
        try:
            return question(*args, **options)
        except DescantError as error:
            return type(error)

    def put(self, owner: str, name: str, digest: str) -> None:
        before = self.catalog.get((owner, name))
        position = self.catalog.next_position if before is None else before.position
        self.catalog.put(Entry(owner=owner, name=name, position=position, source="x", version=version(digest)))
        self.num_made += before is None
        self.own[owner][name] = (position, digest)

    @rule(principal=PRINCIPALS, name=NAMES, is_shared=st.booleans(), digest=DIGESTS)
    def create(self, principal: Principal, name: str, is_shared: bool, digest: str) -> None:
        owner = SHARED if is_shared else principal.name
        found = self.ask(self.catalog.new_key, principal, name, is_shared=is_shared)
        if " " in name:
            assert found is InvalidRequest
        elif owner == SHARED and not principal.is_admin:
            assert found is AdapterForbidden
        elif name in self.own[owner]:
            assert found is AdapterExists
        else:
            assert found == (owner, name)
            self.put(owner, name, digest)

    @rule(principal=PRINCIPALS, name=NAMES, is_shared=st.booleans(), digest=DIGESTS)
    def load(self, principal: Principal, name: str, is_shared: bool, digest: str) -> None:
        owner = SHARED if is_shared else principal.name
        if name not in self.own[owner] and name in self.shared:
            owner = SHARED
        found = self.ask(self.catalog.target_key, principal, name, is_shared=is_shared)
        if " " in name:
            assert found is InvalidRequest
        elif owner == SHARED and not principal.is_admin:
            assert found is AdapterForbidden
        else:
            assert found == (owner, name)
            self.put(owner, name, digest)

    @rule(principal=PRINCIPALS, name=NAMES)
    def destroy(self, principal: Principal, name: str) -> None:
        found = self.ask(self.catalog.require_owned, principal, name)
        owner = principal.name if name in self.own[principal.name] else SHARED
        if name not in self.own[owner]:
            assert found is AdapterNotFound
        elif owner == SHARED and not principal.is_admin:
            assert found is AdapterForbidden
        else:
            assert found.key == (owner, name)
            self.catalog.remove(found.key)
            del self.own[owner][name]

    @rule(principal=PRINCIPALS, name=NAMES)
    def use(self, principal: Principal, name: str) -> None:
        expected = self.own[principal.name].get(name) or self.shared.get(name)
        found = self.ask(self.catalog.require, principal, name)
        assert found is AdapterNotFound if expected is None else found.version == version(expected[1])
        assert self.catalog.find(principal, name) == (None if expected is None else found)

    @invariant()
    def lists_are_the_same(self) -> None:
        for owner in OWNERS:
            expected = sorted((self.shared | self.own[owner]).items(), key=lambda item: item[1][0])
            listed = self.catalog.visible(Principal(owner))
            assert [(e.name, (e.position, e.version and e.version.digest)) for e in listed] == expected

    @invariant()
    def digests_are_counted(self) -> None:
        named = {digest for names in self.own.values() for _, digest in names.values()}
        assert {digest for digest in ("d1", "d2", "d3") if self.catalog.is_named(digest)} == named
        assert len(self.catalog) == len(list(self.catalog)) == sum(map(len, self.own.values()))


TestCatalog = CatalogAgainstDictionaries.TestCase
TestCatalog.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)


def test_pinned_names_come_in_order_of_registration_whatever_was_changed_since() -> None:
    catalog = Catalog(
        Entry(owner=SHARED, name=name, position=position, source="x", is_pinned=name != "b")
        for position, name in enumerate("abc")
    )
    entry = catalog.get((SHARED, "a"))
    assert entry is not None
    catalog.put(entry)

    assert [entry.name for entry in catalog.pinned()] == ["a", "c"]


@pytest.mark.parametrize("is_shared", [True, False])
def test_what_clients_are_told_of_a_name(is_shared: bool) -> None:
    entry = Entry(owner=SHARED if is_shared else "anna", name="a", position=0, source="local", version=version("d"))

    info = entry.info()

    assert (info.digest, info.rank, info.num_bytes, info.is_shared) == ("d", 8, 64, is_shared)
    assert (info.is_pinned, info.is_enabled) == (False, True)


def test_one_name_is_found_and_a_principals_names_are_listed_without_looking_at_everybody_elses() -> None:
    looked_at: list[str] = []

    class Watched(Entry, frozen=True, kw_only=True):
        def __getattribute__(self, name: str) -> object:
            if name in ("name", "owner", "position"):
                looked_at.append(object.__getattribute__(self, "owner"))
            return super().__getattribute__(name)

    catalog = Catalog(
        Watched(owner=owner, name=f"{number}", position=number, source="x")
        for number, owner in enumerate(["anna", "bert", "bert", SHARED])
    )
    looked_at.clear()

    assert catalog.find(Principal("anna"), "0") is not None
    assert catalog.find(Principal("anna"), "3") is not None
    assert catalog.find(Principal("anna"), "1") is None
    assert looked_at == []
    assert len(catalog.visible(Principal("anna"))) == 2
    assert "bert" not in looked_at

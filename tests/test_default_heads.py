"""The default draft heads of the base: their name, and the pause after a failure."""

from __future__ import annotations

import pytest

from descant.catalog.entry import SHARED
from descant.requests.default_heads import RETRY_S, DefaultHeads
from descant.sessions.leases import LeaseTable
from descant_client.errors import AdapterNotFound
from descant_client.speculation import Speculation, SpeculationChoice


def test_the_name_is_the_shared_one() -> None:
    heads = DefaultHeads(Speculation(heads="fast"))

    question = heads.question(LeaseTable().lease())

    assert heads.is_available
    assert (question.heads, question.members, question.principal.name) == ("fast", (), SHARED)


@pytest.mark.parametrize("speculation", ["off", "auto", Speculation(), Speculation(heads=False)])
def test_there_are_none_where_none_are_named(speculation: SpeculationChoice) -> None:
    assert not DefaultHeads(speculation).is_available


def test_after_a_failure_nobody_asks_for_a_while() -> None:
    clock = [0.0]
    heads = DefaultHeads(Speculation(heads="fast"), lambda: clock[0])

    heads.on_failed(AdapterNotFound("fast"))

    assert not heads.is_available
    clock[0] = RETRY_S
    assert heads.is_available

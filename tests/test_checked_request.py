"""A request is checked and read once; defaults of the server are resolved then."""

from __future__ import annotations

from typing import Any

import pytest

from descant.config import Config, SchedulingConfig
from descant.requests.checked import CheckedRequest
from descant_client.errors import InvalidRequest
from descant_client.lifecycle import Combination
from descant_client.protocol import Generate, MergedAdapters
from descant_client.speculation import Speculation, SpeculationChoice
from descant_client.wire import WeightedAdapter

NGRAM = Speculation(heads=False)
NAMED = Speculation(heads="fast")


def checked(default: SpeculationChoice = "auto", /, **fields: Any) -> CheckedRequest:
    config = Config(scheduling=SchedulingConfig(speculation=default))
    return CheckedRequest.of(Generate(request_id="r", **({"prompt": "x"} | fields)), config, 1.0)


@pytest.mark.parametrize(
    ("fields", "members"),
    [
        ({}, ()),
        ({"adapter": "a"}, (WeightedAdapter("a", 1.0),)),
        ({"adapters": [WeightedAdapter("a", 0.5)]}, (WeightedAdapter("a", 0.5),)),
        ({"merged_adapters": MergedAdapters(ids=["a", "b"], weights=[1, 2])},
         (WeightedAdapter("a", 1), WeightedAdapter("b", 2))),
    ],
)  # fmt: skip
def test_every_way_to_name_adapters_gives_members(fields: Any, members: Any) -> None:
    assert checked(**fields).members == members


@pytest.mark.parametrize(
    ("given", "default", "resolved"),
    [
        (None, "off", None),
        (None, "auto", Speculation()),
        (None, NGRAM, NGRAM),
        ("off", NGRAM, None),
        ("auto", "off", Speculation()),
        ("auto", NGRAM, NGRAM),
        (NAMED, "off", NAMED),
    ],
)
def test_the_servers_default_says_how_a_request_without_a_choice_speculates(
    given: Any, default: SpeculationChoice, resolved: Speculation | None
) -> None:
    assert checked(default, speculation=given).speculation == resolved


@pytest.mark.parametrize(
    ("fields", "default", "is_taken"),
    [
        ({}, "auto", True),
        ({}, NAMED, True),
        ({}, NGRAM, False),
        ({}, "off", False),
        ({"adapter": "a"}, "auto", False),
        ({"speculation": NAMED}, "auto", False),
        ({"speculation": "off"}, NAMED, False),
    ],
)
def test_default_heads_are_for_requests_for_the_base_that_name_none(
    fields: Any, default: SpeculationChoice, is_taken: bool
) -> None:
    assert checked(default, **fields).takes_default_heads is is_taken


def test_a_seed_is_drawn_unless_it_is_given() -> None:
    assert checked().seed != checked().seed
    assert checked(seed=0).seed == 0


def test_the_models_stop_tokens_are_added_unless_they_are_ignored() -> None:
    assert checked(stop_token_ids=[1]).stop_token_ids([2]) == {1, 2}
    assert checked(stop_token_ids=[1], ignore_eos=True).stop_token_ids([2]) == {1}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"token_ids": [1], "combination": Combination()}, "prompt"),
        ({"adapter": "a", "merged_adapters": MergedAdapters(ids=["a"]), "n": 64}, "merged_adapters"),
        ({"combination": Combination(), "n": 64}, "combination"),
        ({"speculation": Speculation(min_ngram=4, max_ngram=2), "n": 64}, "speculation"),
        ({"n": 64, "stop": ["x" * 2000]}, "n"),
        ({"stop": ["x" * 2000], "adapters": [WeightedAdapter("a", float("inf"))]}, "stop"),
        ({"adapters": [WeightedAdapter("a", float("inf"))], "combination": Combination("ties")}, "sampling"),
        ({"adapters": [WeightedAdapter("a", 1.0)], "combination": Combination("ties")}, "combination.density"),
    ],
)
def test_the_first_fault_in_the_order_of_the_checks_is_named(fields: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        checked(**fields)

    assert refused.value.data()["field"] == field

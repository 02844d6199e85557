"""The directory of a model's state, and the names that the configuration gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from descant.assembly.registry_setup import configured_adapters, model_directory, registry_config
from descant.config import AdapterConfig, AdapterEntry, Config, KeyConfig, ModelConfig, SchedulingConfig, hash_key
from descant_client.errors import ConfigInvalid
from descant_client.speculation import Speculation


@pytest.mark.parametrize("model_id", ["org/model", "/srv/models/a", "../..", "", ".", "x" * 5000, "naïve\n", "a b"])
def test_every_model_has_a_directory_of_its_own_below_the_data(model_id: str) -> None:
    directory = model_directory(Config(data_dir="/data"), model_id)

    assert directory.parent == Path("/data/models")
    assert directory.name.isascii()
    assert len(directory.name) < 100
    assert directory != model_directory(Config(data_dir="/data"), f"{model_id}/")


def test_the_demo_models_adapters_come_first_and_give_way_to_those_of_the_same_name() -> None:
    entries = [AdapterEntry(name="mine", ref="/mine"), AdapterEntry(name="upper", ref="/upper")]
    adapters = AdapterConfig(entries=entries)

    found = configured_adapters(Config(adapters=adapters))

    assert [entry.name for entry in found] == ["pig-latin", "reverse", "rot13", "base-heads", "mine", "upper"]
    assert configured_adapters(Config(adapters=adapters, model=ModelConfig(path="/model"))) == entries


def test_the_registry_is_told_of_every_configured_name() -> None:
    adapters = AdapterConfig(entries=[AdapterEntry(name="mine", ref="/mine")], max_rank=7)

    told = registry_config(Config(adapters=adapters))

    assert [entry.name for entry in told.entries] == ["pig-latin", "reverse", "rot13", "upper", "base-heads", "mine"]
    assert told.max_rank == 7


@pytest.mark.parametrize(
    ("given", "num_keys", "share"), [(None, 0, 1.0), (None, 2, 0.5), (0.25, 0, 0.25), (0.75, 2, 0.75)]
)
def test_one_principals_own_adapters_may_take_half_where_there_are_several(
    given: float | None, num_keys: int, share: float
) -> None:
    keys = [KeyConfig(name=f"{number}", sha256=hash_key(f"{number}")) for number in range(num_keys)]

    told = registry_config(Config(adapters=AdapterConfig(max_owner_share=given), keys=keys))

    assert told.max_owner_share == share


def test_draft_heads_by_default_are_of_a_configured_name_or_of_one_that_comes_with_the_model() -> None:
    def told(heads: str, model: ModelConfig) -> AdapterConfig:
        speculation = SchedulingConfig(speculation=Speculation(heads=heads))
        return registry_config(Config(adapters=adapters, model=model, scheduling=speculation))

    adapters = AdapterConfig(entries=[AdapterEntry(name="mine", ref="/mine")])

    assert len(told("mine", ModelConfig(path="/model")).entries) == 1
    assert len(told("base-heads", ModelConfig()).entries) == 6
    with pytest.raises(ConfigInvalid, match=r"base-heads.*mine"):
        told("base-heads", ModelConfig(path="/model"))

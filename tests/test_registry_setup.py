"""Where a model's state is, and which names the configuration gives it."""

from __future__ import annotations

from pathlib import Path

import pytest

from descant.config import AdapterConfig, AdapterEntry, Config, ModelConfig
from descant.registry_setup import configured_adapters, model_directory


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

    assert [entry.name for entry in found] == ["pig-latin", "reverse", "rot13", "mine", "upper"]
    assert configured_adapters(Config(adapters=adapters, model=ModelConfig(path="/model"))) == entries

"""New adapters: PEFT's modules, ranks and initialization, and nothing changed."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

import peft_fixture
from descant.actors.worker import Worker
from descant.adapters.create import choose_targets, create
from descant.adapters.prepare import AdapterWorker
from descant.contract.child_config import AdapterLimits
from descant.contract.worker import CreateVersion, Prepared
from descant.model.base_model import BaseModel
from descant.versions.low_rank import LowRankAdapter
from descant.versions.store import read_version
from descant_client.errors import AdapterInvalid, AdapterTooLarge, AdapterUnsupported

LIMITS = AdapterLimits(max_rank=64)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    directory = tmp_path_factory.mktemp("base")
    peft_fixture.tiny_base().save_pretrained(directory)
    return BaseModel.open(directory)


def made(base: BaseModel, rank: int, alpha: float | None = None, targets: list[str] | None = None) -> LowRankAdapter:
    return create(choose_targets("new", base, rank, alpha, targets, LIMITS))


TARGETS: dict[str, Any] = {
    "the default": None,
    "ends of names": ["q_proj", "mlp.down_proj"],
    "whole names": ["model.layers.1.self_attn.q_proj", "lm_head"],
    "every linear": ["All-Linear"],
}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_a_new_adapter_has_the_modules_that_peft_would_make(targets: list[str] | None, base: BaseModel) -> None:
    modules = "all-linear" if targets == ["All-Linear"] else targets
    model = get_peft_model(
        copy.deepcopy(peft_fixture.tiny_base()),
        LoraConfig(task_type="CAUSAL_LM", r=5, lora_alpha=3, target_modules=modules),
    )
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    expected = {
        name.removeprefix(peft_fixture.PREFIX): (
            layer.lora_A["default"].weight.shape,  # type: ignore[union-attr]
            layer.lora_B["default"].weight.shape,  # type: ignore[union-attr]
            pytest.approx(layer.scaling["default"]),
        )
        for name, layer in layers.items()
    }

    factors = made(base, 5, 3, targets).factors

    assert {name: (pair.a.shape, pair.b.shape, pair.scaling) for name, pair in factors.items()} == expected


def test_a_new_adapter_changes_nothing_and_could_be_trained(base: BaseModel) -> None:
    factors = made(base, 16, None, ["all-linear"]).factors

    for pair in factors.values():
        bound = 1 / math.sqrt(pair.a.shape[1])  # Kaiming-uniform with a = sqrt(5)
        assert not pair.b.any()
        assert pair.scaling == 1.0
        assert 0.98 * bound < pair.a.abs().max() <= bound
        assert pair.a.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    firsts = [float(pair.a[0, 0]) for pair in factors.values()]
    assert len(set(firsts)) == len(firsts)


def test_a_scaling_is_a_float32_number(base: BaseModel) -> None:
    pair = made(base, 3, 1.0).factors["model.layers.0.self_attn.q_proj"]

    assert pair.scaling == torch.tensor(1 / 3, dtype=torch.float32).item() != 1 / 3


REFUSED: dict[str, tuple[int, float | None, list[str] | None, str]] = {
    "a rank of nothing": (0, None, None, "rank 0"),
    "a rank over the limit": (65, None, None, "rank 65"),
    "an unknown module": (4, None, ["q_proj", "qq_proj"], "qq_proj"),
    "a part of a name": (4, None, ["proj"], "'proj'"),
    "all-linear and another": (4, None, ["all-linear", "q_proj"], "all-linear"),
    "no module": (4, None, [], "selects no linear"),
    "an infinite alpha": (4, math.inf, None, "alpha"),
    "an alpha beyond float32": (4, 1e300, None, "alpha"),
    "no number for alpha": (4, math.nan, None, "alpha"),
}


@pytest.mark.parametrize(("rank", "alpha", "targets", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_made_is_refused_by_name(
    rank: int, alpha: float | None, targets: list[str] | None, reason: str, base: BaseModel
) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        made(base, rank, alpha, targets)

    assert caught.value.adapter == "new"
    assert reason in caught.value.reason


def test_the_embedding_cannot_be_adapted(base: BaseModel) -> None:
    with pytest.raises(AdapterUnsupported, match="embed_tokens"):
        made(base, 4, None, ["q_proj", "embed_tokens"])


def test_equal_requests_make_one_version(base: BaseModel, tmp_path: Path) -> None:
    worker = Worker(AdapterWorker(base.directory, tmp_path, "float32"))

    one = worker.handle(CreateVersion("one", 4, 8.0, ("q_proj",)))
    same = worker.handle(CreateVersion("two", 4, 8.0, ("q_proj",)))
    other = worker.handle(CreateVersion("three", 4, None, ("q_proj",)))

    assert isinstance(one, Prepared)
    assert one == same != other
    assert (one.version.max_rank, one.version.num_modules) == (4, 2)
    stored = read_version(Path(one.version.path), base.modules).factors
    assert {pair.scaling for pair in stored.values()} == {2.0}


def test_one_too_large_is_refused_before_it_is_made(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("descant.adapters.prepare.create", None)
    worker = AdapterWorker(base.directory, tmp_path, "float32", AdapterLimits(max_extent_bytes=1024))

    with pytest.raises(AdapterTooLarge):
        worker.create("new", 1024, None, ["all-linear"])

"""Adapters end to end: from PEFT's directory through the store and the arena to PEFT's own tokens, in one batch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import tiny_models
from descant.adapters.prepare import AdapterWorker
from descant.contract.plan import NO_ADAPTER
from descant.contract.version import AdapterVersion
from descant_client.lifecycle import Combination
from engine_driver import Driver, Voice, engine_for

MIN_GAP = 1e-4  # between the reference's two best tokens: float rounding may swap closer ones
SUM = (("rank 1", 0.5), ("rank 64", -1.5), ("rslora", 1.0))
ADAPTERS: dict[str, dict[str, Any]] = {
    "rank 1": {"r": 1, "target_modules": ["q_proj", "v_proj"]},
    "rank 8": {"r": 8, "lora_alpha": 16},
    "rank 64": {"r": 64, "lora_alpha": 32, "target_modules": ["o_proj", "down_proj"]},
    "rslora": {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": ["gate_proj", "k_proj"]},
    "patterns": {"r": 7, "rank_pattern": {"q_proj": 33, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"v_proj": 20}},
    "regex": {"r": 3, "target_modules": r".*\.1\..*(up|q)_proj"},
    "one layer": {"r": 5, "layers_to_transform": [0]},
    "head": {"r": 4, "target_modules": ["lm_head", "v_proj"]},
}


@dataclass
class Choir:
    """A base, its adapters as saved by PEFT, and an engine with all of them."""

    directory: Path
    driver: Driver  # one for all tests
    slots: dict[str, int]

    def reference(self, name: str) -> Any:
        base = tiny_models.load_model(self.directory / "base")
        if name == "none":
            return base
        if name != "sum":
            return PeftModel.from_pretrained(base, self.directory / name)
        model = PeftModel.from_pretrained(base, self.directory / SUM[0][0], adapter_name=SUM[0][0])
        for member, _ in SUM[1:]:
            model.load_adapter(self.directory / member, adapter_name=member)
        members, weights = zip(*SUM, strict=True)
        model.add_weighted_adapter(list(members), list(weights), "sum", combination_type="cat")
        model.set_adapter("sum")
        return model


def prepare_all(directory: Path) -> dict[str, AdapterVersion]:
    worker = AdapterWorker(directory / "base", directory / "store", "float32")
    versions: dict[str, AdapterVersion] = {}
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        tiny_models.save_adapter(directory / name, directory / "base", seed, **config)
        versions[name] = worker.prepare(name, directory / name)
    versions["sum"] = worker.compose("sum", [(versions[member], weight) for member, weight in SUM], Combination())
    return versions


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def choir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Choir:
    directory = tmp_path_factory.mktemp(request.param)
    tiny_models.save_model(directory / "base", tiny_models.tiny_config(request.param))
    versions = prepare_all(directory)
    engine = engine_for(directory / "base", num_adapter_slots=12, num_adapter_bytes=2**22)
    slots, offset = {"none": NO_ADAPTER}, 0
    for slot, (name, version) in enumerate(versions.items(), start=2):
        engine.load_adapter(slot, offset, version.path)
        slots[name], offset = slot, offset + version.num_bytes
    return Choir(directory, Driver(engine), slots)


def voices_of(choir: Choir) -> dict[str, Voice]:
    """Return one voice per adapter; lengths, chunks and arrivals all differ."""
    return {
        name: Voice(
            prompt=tiny_models.random_prompt(3 + 17 * i % 60, seed=i + 20),
            max_tokens=6 + i,
            adapter_slot=slot,
            chunk=5 + 4 * i,
            first_step=i // 2,
        )
        for i, (name, slot) in enumerate(choir.slots.items())
    }


def test_a_mixed_batch_says_what_peft_says_with_each_adapter(choir: Choir) -> None:
    voices = voices_of(choir)

    choir.driver.run(list(voices.values()))

    assert len(voices) == 10
    for name, voice in voices.items():
        expected = tiny_models.reference_logits(choir.reference(name), voice.tokens[:-1])[len(voice.prompt) - 1 :]
        best = expected.topk(2)
        assert float((best.values[:, 0] - best.values[:, 1]).min()) > MIN_GAP, name
        assert voice.output == best.indices[:, 0].tolist(), name


def test_every_adapter_changes_the_logits(choir: Choir) -> None:
    prompt = tiny_models.random_prompt(9)
    voices = [Voice(prompt, max_tokens=1, adapter_slot=slot) for slot in choir.slots.values()]

    choir.driver.run(voices)

    last = torch.stack([voice.logits[8] for voice in voices])
    differences = (last.unsqueeze(0) - last.unsqueeze(1)).abs().amax(-1)
    assert float((differences + 10 * torch.eye(len(voices))).min()) > 0.01


def test_a_voice_is_bitwise_the_same_alone(choir: Choir) -> None:
    together, alone = voices_of(choir), voices_of(choir)
    choir.driver.run(list(together.values()))

    for name, voice in alone.items():
        choir.driver.run([voice])
        assert voice.output == together[name].output
        assert all(torch.equal(logits, together[name].logits[at]) for at, logits in voice.logits.items()), name


def test_a_version_loaded_between_two_steps_changes_no_other(choir: Choir, tmp_path: Path) -> None:
    engine, other = choir.driver.engine, prepare_another(choir, tmp_path)
    before, after = (Voice([5, 6, 7], adapter_slot=choir.slots["rank 64"]) for _ in range(2))
    choir.driver.run([before])

    engine.load_adapter(0, 2**22 - other.num_bytes, other.path)
    choir.driver.run([after])
    engine.unload_adapter(0)

    assert all(torch.equal(before.logits[at], logits) for at, logits in after.logits.items())


def prepare_another(choir: Choir, directory: Path) -> AdapterVersion:
    tiny_models.save_adapter(directory / "other", choir.directory / "base", seed=99, r=2)
    return AdapterWorker(choir.directory / "base", directory / "store", "float32").prepare("o", directory / "other")

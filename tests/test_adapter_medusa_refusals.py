"""Errors in a directory of Medusa heads are refused by name; nothing in it is ignored."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import medusa_fixture
import peft_fixture
from descant.adapters.formats.read import read_adapter
from descant.adapters.prepare import AdapterWorker
from descant.contract.child_config import AdapterLimits
from descant.model.base_model import BaseModel
from descant_client.errors import AdapterInvalid, AdapterTooLarge, AdapterUnsupported
from medusa_fixture import CONFIG, TENSORS, edit_tensors, random_heads, save_config, save_heads

LIMITS = AdapterLimits(max_file_bytes=1 << 20, max_config_bytes=1 << 12)
HEADS = random_heads(2, 2, v1=True)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    peft_fixture.tiny_base().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base(base_dir: Path) -> BaseModel:
    return BaseModel.open(base_dir)


@pytest.fixture(scope="module")
def saved_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peft_fixture.save_peft(peft_fixture.tiny_base(), tmp_path_factory.mktemp("lora"), r=2)


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    return save_heads(tmp_path / "heads", HEADS)


@pytest.fixture
def lora(saved_lora: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_lora, tmp_path / "lora"))


WRONG_KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "no heads": ({"medusa_num_heads": 0}, "medusa_num_heads 0; 1 to 16"),
    "fewer than no heads": ({"medusa_num_heads": -1}, "medusa_num_heads -1"),
    "too many heads": ({"medusa_num_heads": 17}, "medusa_num_heads 17"),
    "absurdly many heads": ({"medusa_num_heads": 10**30}, "1 to 16 are allowed"),
    "heads in words": ({"medusa_num_heads": "2"}, "medusa_num_heads"),
    "half a head": ({"medusa_num_heads": 2.5}, "medusa_num_heads"),
    "null heads": ({"medusa_num_heads": None}, "medusa_num_heads"),
    "true heads": ({"medusa_num_heads": True}, "medusa_num_heads"),
    "no layers": ({"medusa_num_layers": 0}, "medusa_num_layers 0; 1 to 8"),
    "too many layers": ({"medusa_num_layers": 9}, "medusa_num_layers 9"),
    "a list of layers": ({"medusa_num_layers": [1]}, "medusa_num_layers"),
    "layers not said": ({"medusa_num_layers": ...}, "medusa_num_layers"),
    "version in words": ({"version": "two"}, "version"),
    "base of another type": ({"base_model_name_or_path": 7}, "base_model_name_or_path"),
    "fewer heads than there are": ({"medusa_num_heads": 1}, "tensor 1.0.linear.bias is for head 1; its config has 1"),
    "more heads than there are": ({"medusa_num_heads": 3}, "tensor 2.0.linear.weight is missing"),
    "fewer layers than there are": ({"medusa_num_layers": 1}, "does not fit medusa_num_layers 1"),
    "more layers than there are": ({"medusa_num_layers": 3}, "does not fit medusa_num_layers 3"),
}


@pytest.mark.parametrize(("changes", "reason"), WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_a_config_that_is_wrong_is_invalid(changes: dict[str, Any], reason: str, heads: Path, base: BaseModel) -> None:
    save_config(heads, HEADS, **changes)

    with pytest.raises(AdapterInvalid) as caught:
        read_adapter("mine", heads, base, LIMITS)

    assert reason in caught.value.reason
    assert caught.value.adapter == "mine"


@pytest.mark.parametrize("version", [0, 1.5, 3, 1e300])
def test_another_version_of_medusa_is_not_supported(version: float, heads: Path, base: BaseModel) -> None:
    save_config(heads, HEADS, version=version)

    with pytest.raises(AdapterUnsupported, match=f"Medusa version {version:g}".replace("+", r"\+")):
        read_adapter("mine", heads, base, LIMITS)


CONFIGS = {
    "nothing": b"",
    "half": b'{"medusa_num_heads": 2,',
    "no object": b"[2]",
    "no text": b'{"medusa_num_heads": "\xff"}',
    "deep": b"[" * 4000,
    "large": b'{"medusa_num_heads": 2, "medusa_num_layers": 2}' + b" " * 4096,
}


@pytest.mark.parametrize("is_beside_lora", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_cannot_be_read_is_invalid(
    config: bytes, is_beside_lora: bool, heads: Path, lora: Path, base: BaseModel
) -> None:
    directory = lora if is_beside_lora else heads
    (directory / CONFIG).write_bytes(config)

    with pytest.raises(AdapterInvalid, match=CONFIG):
        read_adapter("mine", directory, base, LIMITS)


def with_one(value: float) -> Tensor:
    tensor = torch.zeros(32)
    tensor[7] = value
    return tensor


WRONG_TENSORS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "another hidden size": ({"0.1.linear.weight": torch.zeros(48, 48)}, "0.1.linear.weight has shape [48, 48]"),
    "another vocabulary": ({"1.2.weight": torch.zeros(97, 32)}, "need [96, 32]"),
    "a bias of one": ({"1.0.linear.bias": torch.zeros(1)}, "need [32]"),
    "a flat weight": ({"1.0.linear.weight": torch.zeros(32 * 32)}, "need [32, 32]"),
    "a number": ({"1.0.linear.bias": torch.zeros(())}, "has shape []"),
    "a missing weight": ({"0.0.linear.weight": None}, "tensor 0.0.linear.weight is missing"),
    "a missing bias": ({"1.1.linear.bias": None}, "tensor 1.1.linear.bias is missing"),
    "some LM heads": ({"0.2.weight": None}, "0.2.weight is missing; other heads have an LM head of their own"),
    "one head more": ({"2.0.linear.bias": torch.zeros(32)}, "is for head 2; its config has 2 heads"),
    "one layer more": ({"0.2.linear.bias": torch.zeros(32)}, "0.2.linear.bias does not fit medusa_num_layers 2"),
    "an LM head too early": ({"0.1.weight": torch.zeros(96, 32)}, "0.1.weight does not fit medusa_num_layers 2"),
    "one twice": ({"medusa_head.0.0.linear.bias": torch.zeros(32)}, "both mean 0.0.linear.bias"),
    "integers": ({"0.0.linear.bias": torch.zeros(32, dtype=torch.int64)}, "int64, not floating point"),
    "no number": ({"0.0.linear.bias": with_one(float("nan"))}, "0.0.linear.bias holds values that are not finite"),
    "infinity": ({"1.2.weight": with_one(float("inf")).expand(96, 32).clone()}, "1.2.weight holds values"),
    "a long name": ({"x" * 513: torch.zeros(1)}, "a tensor's name has 513 characters"),
}


@pytest.mark.parametrize(("changes", "reason"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_a_tensor_that_is_wrong_is_invalid(
    changes: dict[str, Tensor | None], reason: str, heads: Path, base: BaseModel
) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        read_adapter("mine", edit_tensors(heads, changes), base, LIMITS)

    assert reason in caught.value.reason


UNKNOWN = [
    "0.2.bias",
    "00.0.linear.bias",
    "0.0.linear.bias.extra",
    "medusa_head.x",
    "x.0.0.linear.bias",
    "",
    "٢.0.weight",
]


@pytest.mark.parametrize("name", [*UNKNOWN, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"])
@pytest.mark.parametrize("file", [TENSORS, "another.safetensors"])
def test_a_tensor_nobody_knows_is_refused_by_name(name: str, file: str, heads: Path, base: BaseModel) -> None:
    save_file({}, heads / "another.safetensors")

    with pytest.raises(AdapterUnsupported) as caught:
        read_adapter("mine", edit_tensors(heads, {name: torch.zeros(32)}, file), base, LIMITS)

    assert caught.value.feature == f"the unknown tensor {name}"


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_tensor_nobody_knows_is_refused_beside_lora_too(name: str, lora: Path, base: BaseModel) -> None:
    medusa_fixture.add_to_lora_file(lora, HEADS)

    with pytest.raises(AdapterUnsupported, match="tensor"):
        read_adapter("mine", edit_tensors(lora, {name: torch.zeros(32)}, peft_fixture.TENSORS), base, LIMITS)


def test_heads_in_a_lora_directory_without_their_config_are_refused(lora: Path, base: BaseModel) -> None:
    medusa_fixture.add_to_lora_file(lora, HEADS)
    (lora / CONFIG).unlink()

    with pytest.raises(AdapterUnsupported, match=r"tensor 0\.0\.linear\.bias"):
        read_adapter("mine", lora, base, LIMITS)


def test_the_same_head_in_two_files_is_invalid(lora: Path, base: BaseModel) -> None:
    save_heads(medusa_fixture.add_to_lora_file(lora, HEADS), HEADS)

    with pytest.raises(AdapterInvalid, match=r"both mean 0\.0\.linear\.bias"):
        read_adapter("mine", lora, base, LIMITS)


def test_lora_beside_heads_is_held_to_its_own_rules(lora: Path, base: BaseModel) -> None:
    save_heads(lora, HEADS)
    peft_fixture.edit_config(lora, r=5)

    with pytest.raises(AdapterInvalid, match="lora_A"):
        read_adapter("mine", lora, base, LIMITS)


def cut(heads: Path) -> None:
    (heads / TENSORS).write_bytes((heads / TENSORS).read_bytes()[:-1])


def no_safetensors(heads: Path) -> None:
    (heads / TENSORS).write_bytes(b"PK\x03\x04" * 99)


def a_folder(heads: Path) -> None:
    (heads / "more.safetensors").mkdir()


def a_dangling_link(heads: Path) -> None:
    (heads / "more.safetensors").symlink_to("nowhere")


def no_file(heads: Path) -> None:
    (heads / TENSORS).unlink()


def no_tensor(heads: Path) -> None:
    save_file({}, heads / TENSORS)


@pytest.mark.parametrize("spoil", [cut, no_safetensors, a_folder, a_dangling_link, no_file, no_tensor])
def test_files_that_cannot_be_read_are_invalid(spoil: Callable[[Path], None], heads: Path, base: BaseModel) -> None:
    spoil(heads)

    with pytest.raises(AdapterInvalid, match=r"no readable safetensors|no tensors of the heads"):
        read_adapter("mine", heads, base, LIMITS)


@pytest.mark.parametrize("name", ["medusa_lm_head.pt", "medusa_lm_head.bin", "pytorch_model.bin"])
def test_a_pickle_is_never_opened(name: str, heads: Path, base: BaseModel) -> None:
    (heads / TENSORS).rename(heads / name)

    with pytest.raises(AdapterUnsupported, match=f"{name}, a pickle"):
        read_adapter("mine", heads, base, LIMITS)


def test_files_that_are_too_large_together_are_refused(heads: Path, base: BaseModel) -> None:
    num_bytes = (heads / TENSORS).stat().st_size
    shutil.copy(heads / TENSORS, heads / "more.safetensors")

    with pytest.raises(AdapterTooLarge) as caught:
        read_adapter("mine", heads, base, AdapterLimits(max_file_bytes=2 * num_bytes - 1))

    assert caught.value.num_bytes == 2 * num_bytes


@pytest.mark.parametrize("name", ["1.0.linear.weight", "1.1.linear.bias", "1.2.weight"])
def test_values_beyond_the_served_dtype_are_invalid(name: str, heads: Path, base_dir: Path, tmp_path: Path) -> None:
    tensor = medusa_fixture.named(HEADS)[name]
    tensor.view(-1)[5] = 1e5
    edit_tensors(heads, {name: tensor})

    assert AdapterWorker(base_dir, tmp_path / "store", "bfloat16", LIMITS).prepare("mine", heads).num_heads == 2
    with pytest.raises(AdapterInvalid, match=r"values of draft head 1 leave the range of torch\.float16"):
        AdapterWorker(base_dir, tmp_path / "store", "float16", LIMITS).prepare("mine", heads)


def test_a_config_alone_says_what_it_is_not(heads: Path, base: BaseModel) -> None:
    (heads / CONFIG).write_text("{}")

    with pytest.raises(AdapterInvalid, match=r"no adapter_config\.json"):
        read_adapter("mine", heads, base, LIMITS)

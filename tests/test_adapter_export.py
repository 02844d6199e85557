"""Saved adapters: PEFT loads equal tensors and scalings, and reading one back gives the same version."""

import copy
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer

import peft_fixture
from descant.actors.worker import Worker
from descant.adapters.formats.read import read_adapter
from descant.adapters.prepare import AdapterWorker
from descant.contract.child_config import AdapterLimits
from descant.contract.version import AdapterVersion
from descant.contract.worker import ExportAdapter, Exported
from descant.model.arch import from_hf, lora_modules
from descant.model.base_model import BaseModel
from descant.versions.low_rank import Factors, LowRankAdapter, float32
from descant.versions.store import write_version
from descant_client.errors import AdapterInvalid, InvalidRequest

BASE = peft_fixture.tiny_base()
TIED = peft_fixture.tiny_base("qwen2", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    BASE.save_pretrained(directory / "base")
    TIED.save_pretrained(directory / "tied")
    return directory


def modules_of(root: Path) -> Any:
    return lora_modules(from_hf(root / "base"))


def stored(root: Path, shapes: dict[int, tuple[int, float]], seed: int = 0) -> AdapterVersion:
    """A version with random factors, from rank and scaling by module index."""
    generator, modules = torch.Generator().manual_seed(seed), modules_of(root)
    factors = {}
    for index, (rank, scaling) in shapes.items():
        _, in_features, out_features = modules[index]
        a = torch.randn(rank, in_features, generator=generator)
        factors[modules[index].name] = Factors(a, torch.randn(out_features, rank, generator=generator), scaling)
    digest, path, num_bytes = write_version(root / "store", LowRankAdapter(factors), modules)
    return AdapterVersion(digest, str(path), num_bytes, 1, len(factors))


def worker_of(root: Path, base: str = "base") -> AdapterWorker:
    return AdapterWorker(root / base, root / "store", "float32")


SHAPES = st.dictionaries(
    st.integers(0, 14),
    st.tuples(st.sampled_from([1, 2, 3, 7, 33]), st.floats(-1e3, 1e3, width=32).map(float32)),
    min_size=1,
)


@given(SHAPES, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_saved_version_read_again_is_the_same_version(
    root: Path, shapes: dict[int, tuple[int, float]], seed: int
) -> None:
    version = stored(root, shapes, seed)
    worker = worker_of(root)

    worker.export("mine", version, root / "saved")

    assert worker.prepare("read again", root / "saved").digest == version.digest


ORIGINS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
    "a third": {"r": 3, "lora_alpha": 1, "target_modules": ["q_proj", "lm_head"]},
    "rslora": {"r": 7, "lora_alpha": 12, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    "patterns": {
        "r": 8,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 5},
        "alpha_pattern": {"v_proj": 9, "layers.0.self_attn.q_proj": 2.5},
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("origin", ORIGINS.values(), ids=ORIGINS)
def test_an_adapter_of_peft_is_saved_as_it_was(origin: dict[str, Any], root: Path, tmp_path: Path) -> None:
    saved = peft_fixture.save_peft(BASE, tmp_path / "origin", **origin)
    worker = worker_of(root)
    version = worker.prepare("mine", saved)

    worker.export("mine", version, tmp_path / "saved")

    assert worker.prepare("mine", tmp_path / "saved") == version
    torch.testing.assert_close(
        peft_fixture.peft_deltas(BASE, tmp_path / "saved"), peft_fixture.peft_deltas(BASE, saved), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("base_name", ["base", "tied"])
@given(SHAPES)
@settings(max_examples=6, deadline=None)
def test_peft_loads_the_same_tensors_and_scalings(
    root: Path, base_name: str, shapes: dict[int, tuple[int, float]]
) -> None:
    worker_of(root, base_name).export("mine", stored(root, shapes), root / "for peft")

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns about missing tensors and patterns without a module
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        model = PeftModel.from_pretrained(copy.deepcopy(BASE if base_name == "base" else TIED), root / "for peft")

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    factors = read_adapter("mine", root / "for peft", BaseModel.open(root / base_name), AdapterLimits()).factors
    assert layers.keys() == {peft_fixture.PREFIX + name for name in factors}
    for name, pair in factors.items():
        layer: Any = layers[peft_fixture.PREFIX + name]
        assert torch.equal(layer.lora_A["default"].weight, pair.a)
        assert torch.equal(layer.lora_B["default"].weight, pair.b)
        assert layer.scaling["default"] == pair.scaling


def test_the_config_is_one_of_plain_lora(root: Path, tmp_path: Path) -> None:
    version = stored(root, {0: (4, 2.0), 1: (4, 2.0), 9: (3, 2.0)})

    worker_of(root).export("mine", version, tmp_path / "saved")

    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    names = [f"model.layers.{name}" for name in ("0.self_attn.q_proj", "0.self_attn.k_proj", "1.self_attn.v_proj")]
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, names)
    assert config["rank_pattern"] == {r"^model\.layers\.1\.self_attn\.v_proj": 3}
    assert config["alpha_pattern"] == {r"^model\.layers\.1\.self_attn\.v_proj": 6}
    assert config["base_model_name_or_path"] == str(root / "base")
    assert config["task_type"] == "CAUSAL_LM"


def test_an_adapter_without_modules_cannot_be_saved(root: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="no module at all"):
        worker_of(root).export("mine", stored(root, {}), tmp_path / "saved")

    assert not (tmp_path / "saved").exists()


def test_a_saved_adapter_is_told_by_place_and_size(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "parents" / "saved"

    reply = Worker(worker_of(root)).handle(ExportAdapter("mine", stored(root, {0: (4, 1.0)}), str(target)))

    files = list(target.iterdir())
    assert reply == Exported(str(target), sum(path.stat().st_size for path in files))
    assert {path.name for path in files} == {"adapter_config.json", "adapter_model.safetensors"}
    assert list(target.parent.iterdir()) == [target]


def test_an_adapter_is_saved_over_another(root: Path, tmp_path: Path) -> None:
    target = peft_fixture.save_peft(BASE, tmp_path / "saved", r=2)
    version, worker = stored(root, {0: (4, 1.0)}), worker_of(root)

    worker.export("mine", version, target)

    assert worker.prepare("mine", target).digest == version.digest
    assert list(tmp_path.iterdir()) == [target]


def test_any_number_of_threads_may_work_at_once(root: Path, tmp_path: Path) -> None:
    version, worker = stored(root, {0: (4, 0.5), 8: (33, 2.0)}), worker_of(root)

    def save_and_read(number: int) -> str:
        worker.export("mine", version, tmp_path / str(number % 6))
        return worker.prepare("mine", tmp_path / str(number % 6)).digest

    with ThreadPoolExecutor(6) as pool:
        digests = [digest for begin in (0, 6, 12) for digest in pool.map(save_and_read, range(begin, begin + 6))]

    assert set(digests) == {version.digest}


def test_an_adapter_of_which_the_file_is_damaged_is_not_saved(root: Path, tmp_path: Path) -> None:
    version = stored(root, {0: (4, 1.0)}, seed=7)
    Path(version.path).write_bytes(b"")

    with pytest.raises(AdapterInvalid, match="mine") as caught:
        worker_of(root).export("mine", version, tmp_path / "saved")

    assert caught.value.digest == version.digest


def a_file(target: Path) -> None:
    target.write_text("precious")


def a_folder_of_files(target: Path) -> None:
    target.mkdir()
    (target / "notes.txt").write_text("precious")


def an_adapter_and_more(target: Path) -> None:
    peft_fixture.save_peft(BASE, target, r=2)
    (target / "checkpoint-1").mkdir()


def a_readme_alone(target: Path) -> None:
    target.mkdir()
    (target / "README.md").write_text("precious")


def a_link(target: Path) -> None:
    peft_fixture.save_peft(BASE, target.with_name("elsewhere"), r=2)
    target.symlink_to(target.with_name("elsewhere"))


@pytest.mark.parametrize("make", [a_file, a_folder_of_files, an_adapter_and_more, a_readme_alone, a_link])
def test_what_is_no_adapter_is_never_replaced(make: Any, root: Path, tmp_path: Path) -> None:
    make(tmp_path / "target")
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(InvalidRequest) as caught:
        worker_of(root).export("mine", stored(root, {0: (4, 1.0)}), tmp_path / "target")

    assert caught.value.field == "path"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["base", "base/saved", "store", "store/versions/saved", "tied/../base/saved"])
def test_the_servers_own_directories_are_never_written_to(place: str, root: Path) -> None:
    with pytest.raises(InvalidRequest, match="belongs to the server"):
        worker_of(root).export("mine", stored(root, {0: (4, 1.0)}), root / place)


@pytest.mark.parametrize("place", ["saved", "", "/proc/saved", "/dev/null/saved", "/tmp/a\0b", "/tmp/" + "a" * 300])
def test_a_place_that_cannot_be_written_is_the_requests_fault(place: str, root: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        worker_of(root).export("mine", stored(root, {0: (4, 1.0)}), place)

    assert caught.value.field == "path"


def test_a_write_that_fails_leaves_what_was_there(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError("disk full")

    target = peft_fixture.save_peft(BASE, tmp_path / "saved", r=2)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    monkeypatch.setattr("descant.adapters.export.save_file", fail)

    with pytest.raises(InvalidRequest, match="disk full"):
        worker_of(root).export("mine", stored(root, {0: (4, 1.0)}), target)

    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert list(tmp_path.iterdir()) == [target]

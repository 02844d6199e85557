"""Medusa heads as part of an adapter: from any directory into the store, and exported unchanged."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

import medusa_fixture
import peft_fixture
from descant.adapters.prepare import AdapterWorker
from descant.contract.child_config import AdapterLimits
from descant.contract.version import AdapterVersion
from descant.model.arch import from_hf, lora_modules
from descant.versions.draft_heads import DraftHeads
from descant.versions.low_rank import LowRankAdapter
from descant.versions.store import read_version
from descant_client.errors import AdapterInvalid, AdapterTooLarge, InvalidRequest
from descant_client.lifecycle import Combination
from medusa_fixture import assert_same, random_heads, save_heads

BASE = peft_fixture.tiny_base()
CAT = Combination("cat")
EXTENT_ELEMENTS = 2 * 32 * 32 + 2 * 32 + 2 * 96 * 32  # of two v1 heads: weights, biases, LM heads


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("medusa")
    BASE.save_pretrained(directory / "base")
    peft_fixture.save_peft(BASE, directory / "lora", r=3, target_modules=["q_proj", "down_proj"])
    save_heads(directory / "heads", random_heads(2, 1, v1=True))
    return directory


@pytest.fixture(scope="module")
def worker(root: Path) -> AdapterWorker:
    return AdapterWorker(root / "base", root / "store", "bfloat16")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return peft_fixture.save_peft(BASE, tmp_path / "lora", r=3, target_modules=["q_proj", "down_proj"])


def content(root: Path, version: AdapterVersion) -> LowRankAdapter:
    return read_version(Path(version.path), lora_modules(from_hf(root / "base")))


SHAPES = {"v1": (2, 1, True), "v1 deep": (1, 3, True), "v2": (3, 1, False), "v2 deep": (2, 2, False)}


@pytest.mark.parametrize(("num_heads", "num_layers", "v1"), SHAPES.values(), ids=SHAPES)
def test_heads_alone_are_stored_as_they_are(
    num_heads: int, num_layers: int, v1: bool, root: Path, worker: AdapterWorker, tmp_path: Path
) -> None:
    heads = random_heads(num_heads, num_layers, v1=v1)

    version = worker.prepare("mine", save_heads(tmp_path / "heads", heads))

    assert (version.num_heads, version.num_modules, version.max_rank) == (num_heads, 0, 0)
    assert_same(content(root, version).heads, heads)
    assert not content(root, version).factors


@pytest.mark.parametrize("prefix", ["", "medusa_head.", "medusa_heads."])
@pytest.mark.parametrize("file", ["medusa_lm_head.safetensors", "model-00001-of-00001.safetensors"])
def test_names_may_have_a_prefix_and_the_file_any_name(
    prefix: str, file: str, worker: AdapterWorker, root: Path, tmp_path: Path
) -> None:
    directory = save_heads(tmp_path / "heads", random_heads(2, 1, v1=True), prefix, file, version=2, model_type="x")

    assert worker.prepare("mine", directory) == worker.prepare("mine", root / "heads")


def test_heads_may_be_in_several_files(worker: AdapterWorker, root: Path, tmp_path: Path) -> None:
    directory = save_heads(tmp_path / "heads", random_heads(2, 1, v1=True))
    tensors = medusa_fixture.named(random_heads(2, 1, v1=True))
    medusa_fixture.edit_tensors(directory, {name: None for name in tensors if name.startswith("1.")})
    medusa_fixture.save_file({name: tensors[name] for name in tensors if name[0] == "1"}, directory / "1.safetensors")

    assert worker.prepare("mine", directory) == worker.prepare("mine", root / "heads")


@pytest.mark.parametrize("save", [save_heads, medusa_fixture.add_to_lora_file])
@pytest.mark.parametrize("v1", [True, False])
def test_heads_beside_lora_are_stored_with_it(
    save: Callable[[Path, DraftHeads], Path], v1: bool, root: Path, worker: AdapterWorker, lora: Path
) -> None:
    plain, heads = worker.prepare("plain", lora), random_heads(2, 1, v1=v1)

    version = worker.prepare("mine", save(lora, heads))

    assert (version.num_heads, version.num_modules, version.max_rank) == (2, 4, 3)
    assert version.digest != plain.digest
    assert_same(content(root, version).heads, heads)
    for name, pair in content(root, plain).factors.items():
        assert torch.equal(content(root, version).factors[name].b, pair.b)


@pytest.mark.parametrize("config", ["{}", '{"model_type": "llama", "medusa_num_layers": 1}'])
def test_a_lora_directory_with_another_config_is_what_it_was(config: str, worker: AdapterWorker, lora: Path) -> None:
    plain = worker.prepare("mine", lora)
    (lora / "config.json").write_text(config)
    medusa_fixture.save_file({"anything": torch.zeros(1)}, lora / "more.safetensors")

    assert worker.prepare("mine", lora) == plain


def test_the_digest_is_that_of_factors_and_heads(worker: AdapterWorker, tmp_path: Path) -> None:
    def digest(name: str, heads: DraftHeads) -> str:
        return worker.prepare("mine", save_heads(tmp_path / name, heads)).digest

    one, v2 = random_heads(2, 1, v1=True), random_heads(2, 1, v1=False)
    changed = DraftHeads(one.weight, one.bias + torch.tensor([0.0] * 31 + [1.0]), one.lm_heads)
    reshaped = DraftHeads(v2.weight.transpose(0, 1), v2.bias.transpose(0, 1), None)

    assert digest("a", one) == digest("b", one)
    assert len({digest("a", one), digest("c", changed), digest("d", v2), digest("e", reshaped)}) == 4


def test_a_version_with_heads_says_how_large_it_is(worker: AdapterWorker, root: Path) -> None:
    version = worker.prepare("mine", root / "heads")

    assert version.num_bytes == EXTENT_ELEMENTS * 2
    assert version.file_bytes == Path(version.path).stat().st_size > EXTENT_ELEMENTS * 4


def test_heads_count_in_the_extent_limit(root: Path, tmp_path: Path) -> None:
    limits = AdapterLimits(max_extent_bytes=EXTENT_ELEMENTS * 2 - 1)
    small = AdapterWorker(root / "base", tmp_path / "store", "bfloat16", limits)

    with pytest.raises(AdapterTooLarge) as caught:
        small.prepare("mine", root / "heads")

    assert caught.value.num_bytes == EXTENT_ELEMENTS * 2


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 99)),
    st.none() | st.tuples(st.integers(1, 9), st.integers(1, 40)),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_saved_version_read_again_is_the_same_version(
    root: Path, shape: tuple[int, int, bool, int], lora: tuple[int, float] | None
) -> None:
    worker, (num_heads, num_layers, v1, seed) = AdapterWorker(root / "base", root / "store", "float32"), shape
    heads = worker.prepare("heads", save_heads(root / "given", random_heads(num_heads, num_layers, v1=v1, seed=seed)))
    factors = worker.create("new", lora[0], lora[1], ["q_proj", "lm_head"]) if lora else None
    version = worker.with_heads("mine", factors, heads)

    worker.export("mine", version, root / "saved")

    assert worker.prepare("read again", root / "saved") == version


@pytest.mark.parametrize(("v1", "version"), [(True, 1), (False, 2)])
def test_heads_are_saved_as_medusa_has_them(v1: bool, version: int, worker: AdapterWorker, tmp_path: Path) -> None:
    heads = random_heads(2, 3, v1=v1)
    prepared = worker.prepare("mine", save_heads(tmp_path / "given", heads))

    worker.export("mine", prepared, tmp_path / "saved")

    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"config.json", "medusa_lm_head.safetensors"}
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["medusa_num_heads"], config["medusa_num_layers"], config["version"]) == (2, 3, version)
    saved, expected = (
        medusa_fixture.load_file(tmp_path / name / medusa_fixture.TENSORS) for name in ("saved", "given")
    )
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


def test_peft_loads_the_lora_of_what_is_saved_with_heads(worker: AdapterWorker, lora: Path, tmp_path: Path) -> None:
    version = worker.prepare("mine", save_heads(lora, random_heads(2, 1, v1=False)))

    worker.export("mine", version, tmp_path / "saved")

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns about missing tensors
        PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "saved")
    saved, given = (peft_fixture.peft_deltas(BASE, directory) for directory in (tmp_path / "saved", lora))
    torch.testing.assert_close(saved, given, rtol=1e-6, atol=0)


def test_an_adapter_with_heads_is_saved_over_another(worker: AdapterWorker, root: Path, tmp_path: Path) -> None:
    heads = worker.prepare("heads", root / "heads")
    both = worker.with_heads("both", worker.prepare("lora", root / "lora"), heads)

    for version in (heads, both, heads, both):
        worker.export("mine", version, tmp_path / "saved")
        assert worker.prepare("mine", tmp_path / "saved") == version


def test_a_checkpoint_or_a_config_alone_is_never_replaced(worker: AdapterWorker, root: Path, tmp_path: Path) -> None:
    heads = worker.prepare("heads", root / "heads")
    for names in ({"config.json", "model.safetensors"}, {"config.json"}, {"medusa_lm_head.safetensors"}):
        target = tmp_path / "-".join(sorted(names))
        target.mkdir()
        for name in names:
            (target / name).write_text("precious")

        with pytest.raises(InvalidRequest, match="choose another path"):
            worker.export("mine", heads, target)

        assert {path.name for path in target.iterdir()} == names


def test_a_merged_checkpoint_leaves_heads_out(worker: AdapterWorker, root: Path, tmp_path: Path) -> None:
    lora, heads = worker.prepare("lora", root / "lora"), worker.prepare("heads", root / "heads")

    worker.export_merged("mine", lora, tmp_path / "plain")
    worker.export_merged("mine", worker.with_heads("both", lora, heads), tmp_path / "both")

    plain, both = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("plain", "both"))
    assert plain == both


def test_heads_alone_cannot_be_merged(worker: AdapterWorker, root: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="no module at all"):
        worker.export_merged("mine", worker.prepare("heads", root / "heads"), tmp_path / "merged")

    assert not (tmp_path / "merged").exists()


# ---- heads of one version, factors of another -----------------------------------------------------------------------


def test_with_heads_has_the_factors_of_one_and_the_heads_of_another(worker: AdapterWorker, root: Path) -> None:
    lora, heads = worker.prepare("lora", root / "lora"), worker.prepare("heads", root / "heads")

    version = worker.with_heads("mine", lora, heads)

    assert (version.num_heads, version.num_modules, version.max_rank) == (2, lora.num_modules, 3)
    assert version.num_bytes == lora.num_bytes + heads.num_bytes
    assert_same(content(root, version).heads, random_heads(2, 1, v1=True))
    for name, pair in content(root, lora).factors.items():
        assert torch.equal(content(root, version).factors[name].a, pair.a)


def test_with_heads_takes_no_factors_of_the_heads_and_no_heads_of_the_factors(
    worker: AdapterWorker, root: Path, tmp_path: Path
) -> None:
    lora, heads = worker.prepare("lora", root / "lora"), worker.prepare("heads", root / "heads")
    others = worker.prepare("others", save_heads(tmp_path / "others", random_heads(1, 1, v1=False)))
    both = worker.with_heads("both", lora, heads)

    assert worker.with_heads("mine", None, both) == worker.with_heads("mine", None, heads) == heads
    assert worker.with_heads("mine", both, others) == worker.with_heads("mine", lora, others)


def test_with_heads_needs_heads(worker: AdapterWorker, root: Path) -> None:
    lora = worker.prepare("lora", root / "lora")

    with pytest.raises(AdapterInvalid, match="has none") as caught:
        worker.with_heads("mine", None, lora)

    assert caught.value.adapter == "mine"


# ---- combinations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", ["cat", "svd", "linear"])
def test_one_adapter_with_weight_one_keeps_its_heads(type_: str, worker: AdapterWorker, root: Path) -> None:
    lora, heads = worker.prepare("lora", root / "lora"), worker.prepare("heads", root / "heads")
    both = worker.with_heads("both", lora, heads)

    combined = worker.compose("sum", [(both, 1.0)], Combination(type_))  # pyright: ignore[reportArgumentType]

    assert combined.num_heads == 2
    assert_same(content(root, combined).heads, random_heads(2, 1, v1=True))


def test_combinations_have_no_heads(worker: AdapterWorker, root: Path) -> None:
    lora, heads = worker.prepare("lora", root / "lora"), worker.prepare("heads", root / "heads")
    both = worker.with_heads("both", lora, heads)

    assert worker.compose("sum", [(both, 0.5)], CAT) == worker.compose("sum", [(lora, 0.5)], CAT)
    assert worker.compose("sum", [(lora, 1.0), (heads, 1.0)], CAT).num_heads == 0
    assert worker.compose("sum", [(both, 1.0), (both, 1.0)], CAT).num_heads == 0
    assert worker.compose("sum", [(heads, 2.0)], CAT).num_bytes == 0

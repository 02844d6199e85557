"""Versions in the store: content-addressed, and complete or absent. Sums are exact."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import peft_fixture
from descant.actors.worker import Worker
from descant.adapters.merge import weighted_sum
from descant.adapters.prepare import AdapterWorker
from descant.contract.child_config import AdapterLimits
from descant.contract.worker import ComposeAdapters, Member
from descant.model.arch import LoraModule
from descant.versions import store
from descant.versions.low_rank import Factors, LowRankAdapter
from descant_client.errors import AdapterInvalid, AdapterTooLarge
from descant_client.lifecycle import Combination
from medusa_fixture import random_heads

MODULES = (LoraModule("q", 6, 4), LoraModule("k", 6, 2), LoraModule("head", 6, 10))


CAT = Combination("cat")


def random_adapter(ranks: dict[str, int], seed: int = 0, scaling: float = 1.0) -> LowRankAdapter:
    generator = torch.Generator().manual_seed(seed)
    sizes = {module.name: (module.in_features, module.out_features) for module in MODULES}
    return LowRankAdapter(
        {
            name: Factors(
                torch.randn(rank, sizes[name][0], generator=generator),
                torch.randn(sizes[name][1], rank, generator=generator),
                scaling,
            )
            for name, rank in ranks.items()
        }
    )


SMALL = {
    "factors": random_adapter({"k": 1}),
    "draft heads": LowRankAdapter({}, random_heads(1, 1, v1=False, hidden=6, vocab=10)),
}


def deltas(adapter: LowRankAdapter) -> dict[str, torch.Tensor]:
    return {name: pair.b.double() @ pair.a.double() for name, pair in adapter.factors.items()}


@pytest.mark.parametrize("ranks", [{"head": 3, "q": 2}, {"k": 70}, {}], ids=str)
def test_what_is_stored_is_read_back(ranks: dict[str, int], tmp_path: Path) -> None:
    adapter = random_adapter(ranks, scaling=0.375)

    digest, path, num_bytes = store.write_version(tmp_path, adapter, MODULES)
    found = store.read_version(path, MODULES).factors

    assert (path, num_bytes) == (tmp_path / "versions" / f"{digest}.safetensors", path.stat().st_size)
    assert sorted(found) == sorted(ranks)
    for name, pair in adapter.factors.items():
        assert torch.equal(found[name].a, pair.a)
        assert torch.equal(found[name].b, pair.b)
        assert found[name].scaling == 0.375


def test_a_stored_file_says_what_it_is(tmp_path: Path) -> None:
    adapter = random_adapter({"q": 2, "head": 5}, scaling=0.5)
    _, path, _ = store.write_version(tmp_path, adapter, MODULES)

    with safe_open(path, framework="pt") as file:
        metadata, data = file.metadata(), file.get_tensor("data")

    modules = '{"0":[2,0.5],"2":[5,0.5]}'
    assert metadata == {"format": "descant-version-4", "base": store.base_fingerprint(MODULES), "modules": modules}
    assert torch.equal(data[:48].view(6, 8)[:, :2].T, adapter.factors["q"].a)
    assert not data[48:64].any()
    assert torch.equal(data[128 + 64 : 128 + 64 + 80].view(5, 16)[:, :10].T, adapter.factors["head"].b)
    assert len(data) == 128 + 192


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    def digest(folder: str, seed: int = 0, scaling: float = 1.0) -> str:
        adapter = random_adapter({"q": 2, "k": 1}, seed, scaling)
        return store.write_version(tmp_path / folder, adapter, MODULES).digest

    assert digest("a") == digest("b")
    assert len({digest("a"), digest("a", seed=1), digest("a", scaling=2.0)}) == 3


def test_a_version_already_stored_is_not_written_again(tmp_path: Path) -> None:
    _, path, _ = store.write_version(tmp_path, random_adapter({"q": 2}), MODULES)
    before = path.stat()

    store.write_version(tmp_path, random_adapter({"q": 2}), MODULES)

    assert path.stat().st_ino == before.st_ino


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(store, "sync", fail)
    with pytest.raises(OSError, match="disk full"):
        store.write_version(tmp_path, random_adapter({"q": 2}), MODULES)

    assert list((tmp_path / "versions").iterdir()) == []


@pytest.mark.parametrize("adapter", SMALL.values(), ids=SMALL)
def test_a_version_with_any_bit_flipped_is_invalid(adapter: LowRankAdapter, tmp_path: Path) -> None:
    _, path, _ = store.write_version(tmp_path, adapter, MODULES)
    whole = path.read_bytes()

    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        with pytest.raises(AdapterInvalid):
            store.read_extent(path, MODULES)


@pytest.mark.parametrize("adapter", SMALL.values(), ids=SMALL)
def test_a_version_cut_anywhere_or_with_more_behind_it_is_invalid(adapter: LowRankAdapter, tmp_path: Path) -> None:
    _, path, _ = store.write_version(tmp_path, adapter, MODULES)
    whole = path.read_bytes()

    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(AdapterInvalid):
            store.read_extent(path, MODULES)
    path.write_bytes(whole + b"\0")
    with pytest.raises(AdapterInvalid):
        store.read_extent(path, MODULES)


LIES = {
    "a larger rank": '{"0":[12,1.0]}',
    "a smaller rank": '{"0":[1,1.0]}',
    "a rank of the same size": '{"0":[3,1.0]}',
    "a huge rank": '{"0":[4611686018427387904,1.0]}',
    "a rank of a hundred digits": '{"0":[1' + "0" * 99 + ",1.0]}",
    "a negative rank": '{"0":[-2,1.0]}',
    "no rank": '{"0":[0,1.0]}',
    "another scaling": '{"0":[2,2.0]}',
    "a scaling without a value": '{"0":[2,null]}',
    "another module": '{"1":[2,1.0]}',
    "an unknown module": '{"3":[2,1.0]}',
    "a negative module": '{"-1":[2,1.0]}',
    "a module twice": '{"0":[2,1.0],"0":[2,1.0]}',
    "other spaces": '{"0": [2,1.0]}',
    "no table": "",
    "a deep table": "[" * 100_000,
}


@pytest.mark.parametrize("table", LIES.values(), ids=LIES)
def test_a_version_whose_table_lies_is_invalid(table: str, tmp_path: Path) -> None:
    _, path, _ = store.write_version(tmp_path, random_adapter({"q": 2}), MODULES)
    metadata = {"format": store.FORMAT, "base": store.base_fingerprint(MODULES), "modules": table}
    save_file(load_file(path), path, metadata=metadata)

    with pytest.raises(AdapterInvalid) as caught:
        store.read_extent(path, MODULES)

    assert caught.value.adapter == path.stem


def other_dtype(path: Path, metadata: dict[str, str]) -> None:
    save_file({"data": load_file(path)["data"].view(torch.int32)}, path, metadata=metadata)


def other_shape(path: Path, metadata: dict[str, str]) -> None:
    save_file({"data": load_file(path)["data"].view(8, -1)}, path, metadata=metadata)


def two_tensors(path: Path, metadata: dict[str, str]) -> None:
    save_file({"data": load_file(path)["data"], "more": torch.zeros(0)}, path, metadata=metadata)


def first_format(path: Path, metadata: dict[str, str]) -> None:
    pair = random_adapter({"q": 2}).factors["q"]
    save_file({"0.A": pair.a, "0.B": pair.b}, path, metadata={"format": "descant-version-1", "base": metadata["base"]})


def huge_header(path: Path, metadata: dict[str, str]) -> None:
    path.write_bytes((2**63).to_bytes(8, "little") + path.read_bytes()[8:])


@pytest.mark.parametrize("spoil", [other_dtype, other_shape, two_tensors, first_format, huge_header])
def test_a_file_of_another_make_is_invalid(spoil: Callable[[Path, dict[str, str]], None], tmp_path: Path) -> None:
    _, path, _ = store.write_version(tmp_path, random_adapter({"q": 2}), MODULES)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    spoil(path, metadata)

    with pytest.raises(AdapterInvalid, match=path.stem):
        store.read_extent(path, MODULES)


def test_a_missing_version_is_invalid(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="mine"):
        store.read_version(tmp_path / "versions" / "0.safetensors", MODULES, "mine")


@pytest.mark.parametrize("size", [0, 60, 200])
def test_a_damaged_version_is_written_anew(size: int, tmp_path: Path) -> None:
    _, path, _ = store.write_version(tmp_path, random_adapter({"q": 2}), MODULES)
    path.write_bytes(path.read_bytes()[:size])

    store.write_version(tmp_path, random_adapter({"q": 2}), MODULES)

    assert torch.equal(store.read_version(path, MODULES).factors["q"].a, random_adapter({"q": 2}).factors["q"].a)


def test_bases_of_other_shapes_share_a_store_without_sharing_versions(tmp_path: Path) -> None:
    resized = (*MODULES[:-1], LoraModule("head", 6, 11))
    _, path, _ = store.write_version(tmp_path, random_adapter({"q": 2}), MODULES)
    _, other, _ = store.write_version(tmp_path, random_adapter({"q": 2}), resized)

    assert path != other
    assert list(store.read_version(path, MODULES).factors) == list(store.read_version(other, resized).factors) == ["q"]


def test_what_killed_writers_left_behind_is_swept_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    store.write_version(tmp_path, random_adapter({"q": 2}), MODULES)
    left, young = tmp_path / "versions" / ".left.partial", tmp_path / "versions" / ".young.partial"
    for path in (left, young):
        path.touch()
    os.utime(left, (0, 0))

    store.sweep(tmp_path)

    assert not left.exists()
    assert len(list((tmp_path / "versions").iterdir())) == 2


def test_a_version_of_another_base_is_invalid(tmp_path: Path) -> None:
    _, path, _ = store.write_version(tmp_path, random_adapter({"q": 2}), MODULES)

    with pytest.raises(AdapterInvalid, match="another base"):
        store.read_version(path, (LoraModule("q", 6, 5), *MODULES[1:]))


def test_a_sum_is_the_weighted_sum_of_the_updates() -> None:
    one, two = random_adapter({"q": 2, "k": 1}), random_adapter({"q": 3, "head": 4}, seed=1)

    summed = deltas(weighted_sum([(one, 0.5), (two, -2.0)]))

    assert summed.keys() == {"q", "k", "head"}
    torch.testing.assert_close(summed["q"], 0.5 * deltas(one)["q"] - 2 * deltas(two)["q"], rtol=0, atol=1e-12)
    torch.testing.assert_close(summed["k"], 0.5 * deltas(one)["k"], rtol=0, atol=1e-12)
    torch.testing.assert_close(summed["head"], -2 * deltas(two)["head"], rtol=0, atol=1e-12)


@pytest.fixture
def worker(tmp_path: Path) -> AdapterWorker:
    base = peft_fixture.tiny_base()
    base.save_pretrained(tmp_path / "base")
    peft_fixture.save_peft(base, tmp_path / "one", r=4, target_modules=["q_proj"])
    peft_fixture.save_peft(base, tmp_path / "two", seed=2, r=3, target_modules="all-linear")
    return AdapterWorker(tmp_path / "base", tmp_path / "store", "bfloat16")


def test_a_prepared_version_says_how_large_it_is(worker: AdapterWorker, tmp_path: Path) -> None:
    version = worker.prepare("one", tmp_path / "one")

    assert (version.max_rank, version.num_modules) == (4, 2)
    assert version.file_bytes == Path(version.path).stat().st_size
    assert version.num_bytes == 2 * (32 * 8 + 4 * 32) * 2  # rows of A have at least 8 elements
    assert version.path == str(tmp_path / "store" / "versions" / f"{version.digest}.safetensors")


def test_the_same_content_is_the_same_version(worker: AdapterWorker, tmp_path: Path) -> None:
    version = worker.prepare("one", tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "moved")
    peft_fixture.edit_config(tmp_path / "moved", lora_dropout=0.5)

    assert worker.prepare("another name", tmp_path / "moved") == version


def test_a_sum_is_one_version_in_any_order(worker: AdapterWorker, tmp_path: Path) -> None:
    one, two = worker.prepare("one", tmp_path / "one"), worker.prepare("two", tmp_path / "two")

    summed = worker.compose("sum", [(one, 0.5), (two, 2.0)], CAT)

    assert (summed.max_rank, summed.num_modules) == (7, 14)
    assert (
        summed
        == worker.compose("sum", [(two, 2.0), (one, 0.5)], CAT)
        != worker.compose("sum", [(one, 2.0), (two, 0.5)], CAT)
    )


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e39])
def test_a_sum_that_is_not_finite_is_invalid(weight: float, worker: AdapterWorker, tmp_path: Path) -> None:
    one = worker.prepare("one", tmp_path / "one")

    with pytest.raises(AdapterInvalid):
        worker.compose("sum", [(one, weight)], CAT)


def test_errors_of_a_sum_call_it_as_its_user_does(worker: AdapterWorker, tmp_path: Path) -> None:
    one = worker.prepare("one", tmp_path / "one")
    Path(one.path).unlink()

    with pytest.raises(AdapterInvalid) as missing:
        Worker(worker).handle(ComposeAdapters("0.5*one", (Member(one, 0.5),), CAT))
    with pytest.raises(AdapterInvalid) as infinite:
        Worker(worker).handle(ComposeAdapters("inf*one", (Member(one, float("inf")),), CAT))

    assert (missing.value.adapter, infinite.value.adapter) == ("0.5*one", "inf*one")


def test_a_worker_sweeps_its_store(worker: AdapterWorker, tmp_path: Path) -> None:
    worker.prepare("one", tmp_path / "one")
    left = tmp_path / "store" / "versions" / ".left.partial"
    left.touch()
    os.utime(left, (0, 0))

    AdapterWorker(tmp_path / "base", tmp_path / "store", "bfloat16")

    assert not left.exists()


def test_values_beyond_the_served_dtype_are_invalid(worker: AdapterWorker, tmp_path: Path) -> None:
    peft_fixture.edit_config(tmp_path / "one", lora_alpha=1e7)
    half = AdapterWorker(tmp_path / "base", tmp_path / "store", "float16")

    assert worker.prepare("one", tmp_path / "one").max_rank == 4
    with pytest.raises(AdapterInvalid, match="float16"):
        half.prepare("one", tmp_path / "one")


def test_a_version_over_the_extent_limit_is_too_large(worker: AdapterWorker, tmp_path: Path) -> None:
    limits = AdapterLimits(max_extent_bytes=1023)
    small = AdapterWorker(tmp_path / "base", tmp_path / "small", "bfloat16", limits)

    with pytest.raises(AdapterTooLarge) as caught:
        small.prepare("one", tmp_path / "one")

    assert (caught.value.num_bytes, caught.value.max_bytes) == (1536, 1023)
    assert not (tmp_path / "small").exists()

"""Versions in the store: content-addressed, whole or not there; sums are exact."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import peft_fixture
from descant.actors.worker import Worker
from descant.adapters import store
from descant.adapters.compose import weighted_sum
from descant.adapters.limits import AdapterLimits
from descant.adapters.low_rank import Factors, LowRankAdapter
from descant.adapters.prepare import AdapterWorker
from descant.engine.arch import LoraModule
from descant.messages import ComposeAdapters, Member
from descant_client.errors import AdapterInvalid, AdapterTooLarge

MODULES = (LoraModule("q", 6, 4), LoraModule("k", 6, 2), LoraModule("head", 6, 10))


def random_adapter(ranks: dict[str, int], seed: int = 0) -> LowRankAdapter:
    generator = torch.Generator().manual_seed(seed)
    sizes = {module.name: (module.in_features, module.out_features) for module in MODULES}
    return LowRankAdapter(
        {
            name: Factors(
                torch.randn(rank, sizes[name][0], generator=generator),
                torch.randn(sizes[name][1], rank, generator=generator),
            )
            for name, rank in ranks.items()
        }
    )


def deltas(adapter: LowRankAdapter) -> dict[str, torch.Tensor]:
    return {name: pair.b.double() @ pair.a.double() for name, pair in adapter.factors.items()}


def test_what_is_stored_is_read_back_by_module_index(tmp_path: Path) -> None:
    adapter = random_adapter({"head": 3, "q": 2})

    digest, path = store.write_version(tmp_path, adapter, MODULES)
    factors = store.read_version(path, MODULES)

    assert path == tmp_path / "versions" / f"{digest}.safetensors"
    assert list(factors) == [0, 2]
    assert torch.equal(factors[2].b, adapter.factors["head"].b)


def test_a_stored_file_says_what_it_is(tmp_path: Path) -> None:
    _, path = store.write_version(tmp_path, random_adapter({"q": 2}), MODULES)

    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["0.A", "0.B"]
        assert file.metadata() == {"format": "descant-version-1", "base": store.base_fingerprint(MODULES)}


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    digest, _ = store.write_version(tmp_path / "a", random_adapter({"q": 2, "k": 1}), MODULES)
    same, _ = store.write_version(tmp_path / "b", random_adapter({"q": 2, "k": 1}), MODULES)
    other, _ = store.write_version(tmp_path / "b", random_adapter({"q": 2, "k": 1}, seed=1), MODULES)

    assert digest == same != other


def test_a_version_already_stored_is_not_written_again(tmp_path: Path) -> None:
    _, path = store.write_version(tmp_path, random_adapter({"q": 2}), MODULES)
    before = path.stat()

    store.write_version(tmp_path, random_adapter({"q": 2}), MODULES)

    assert path.stat().st_ino == before.st_ino


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(store, "_sync", fail)
    with pytest.raises(OSError, match="disk full"):
        store.write_version(tmp_path, random_adapter({"q": 2}), MODULES)

    assert list((tmp_path / "versions").iterdir()) == []


@pytest.mark.parametrize("position", [-1, 20, 60])
def test_a_damaged_version_is_invalid(position: int, tmp_path: Path) -> None:
    _, path = store.write_version(tmp_path, random_adapter({"q": 2}), MODULES)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)

    with pytest.raises(AdapterInvalid):
        store.read_version(path, MODULES)


@pytest.mark.parametrize("size", [0, 60, 200])
def test_a_damaged_version_is_written_anew(size: int, tmp_path: Path) -> None:
    _, path = store.write_version(tmp_path, random_adapter({"q": 2}), MODULES)
    path.write_bytes(path.read_bytes()[:size])

    store.write_version(tmp_path, random_adapter({"q": 2}), MODULES)

    assert torch.equal(store.read_version(path, MODULES)[0].a, random_adapter({"q": 2}).factors["q"].a)


def test_bases_of_other_shapes_share_a_store_without_sharing_versions(tmp_path: Path) -> None:
    resized = (*MODULES[:-1], LoraModule("head", 6, 11))
    _, path = store.write_version(tmp_path, random_adapter({"q": 2}), MODULES)
    _, other = store.write_version(tmp_path, random_adapter({"q": 2}), resized)

    assert store.read_version(path, MODULES).keys() == store.read_version(other, resized).keys() == {0}


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
    _, path = store.write_version(tmp_path, random_adapter({"q": 2}), MODULES)

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
    assert version.num_bytes == 2 * 4 * (32 + 32) * 2
    assert version.path == str(tmp_path / "store" / "versions" / f"{version.digest}.safetensors")


def test_the_same_content_is_the_same_version(worker: AdapterWorker, tmp_path: Path) -> None:
    version = worker.prepare("one", tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "moved")
    peft_fixture.edit_config(tmp_path / "moved", lora_dropout=0.5)

    assert worker.prepare("another name", tmp_path / "moved") == version


def test_a_sum_is_one_version_in_any_order(worker: AdapterWorker, tmp_path: Path) -> None:
    one, two = worker.prepare("one", tmp_path / "one"), worker.prepare("two", tmp_path / "two")

    summed = worker.compose("sum", [(one, 0.5), (two, 2.0)])

    assert (summed.max_rank, summed.num_modules) == (7, 14)
    assert summed == worker.compose("sum", [(two, 2.0), (one, 0.5)]) != worker.compose("sum", [(one, 2.0), (two, 0.5)])


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e39])
def test_a_sum_that_is_not_finite_is_invalid(weight: float, worker: AdapterWorker, tmp_path: Path) -> None:
    one = worker.prepare("one", tmp_path / "one")

    with pytest.raises(AdapterInvalid):
        worker.compose("sum", [(one, weight)])


def test_errors_of_a_sum_call_it_as_its_user_does(worker: AdapterWorker, tmp_path: Path) -> None:
    one = worker.prepare("one", tmp_path / "one")
    Path(one.path).unlink()

    with pytest.raises(AdapterInvalid) as missing:
        Worker(worker).handle(ComposeAdapters("0.5*one", (Member(one, 0.5),)))
    with pytest.raises(AdapterInvalid) as infinite:
        Worker(worker).handle(ComposeAdapters("inf*one", (Member(one, float("inf")),)))

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

    assert (caught.value.num_bytes, caught.value.max_bytes) == (1024, 1023)
    assert not (tmp_path / "small").exists()

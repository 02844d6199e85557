"""The benchmarks import, and what they compute before and after measuring is right. Nothing is measured here."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol

from descant_client.protocol import SUBPROTOCOLS, Accepted, Delta, encoder_for

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True, scope="module")
def _import_as_scripts_do() -> Iterator[None]:
    """Benchmarks find each other beside themselves; other tests may have modules of the same names."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def load(name: str) -> Any:
    """A benchmark's module, its main not run; found by its file, as other packages look for one called `kernels`."""
    found = sys.modules.get(name)
    if found is None or getattr(found, "__file__", None) != str(BENCHMARKS / f"{name}.py"):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        found = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_imports(path: Path) -> None:
    assert load(path.stem).__doc__


def test_the_large_shape_has_as_many_parameters_as_its_model_card_says() -> None:
    shape = load("random_model").QWEN_05B

    assert shape.num_parameters == 494_032_768


def test_a_shape_has_the_tensors_that_transformers_gives_its_config(tmp_path: Path) -> None:
    random_model = load("random_model")
    random_model.write_config(tmp_path, random_model.CHECK)

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen2Config.from_pretrained(tmp_path))

    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert random_model.tensor_shapes(random_model.CHECK) == expected


def test_a_shape_names_the_modules_that_the_server_finds_in_its_config(tmp_path: Path) -> None:
    random_model = load("random_model")
    random_model.write_config(tmp_path, random_model.CHECK)

    found = random_model.projections(tmp_path)

    assert sorted(random_model.CHECK.modules) == sorted(found)
    assert len(found) == 7 * random_model.CHECK.num_hidden_layers


def test_an_adapter_has_as_many_parameters_as_are_counted(tmp_path: Path) -> None:
    random_model = load("random_model")
    modules = random_model.CHECK.modules

    random_model.write_adapter(tmp_path, modules, 3, 0, torch.float32)

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == random_model.num_adapter_parameters(modules, 3)
    assert all(bool(tensor.any()) for tensor in tensors.values())


def test_a_cached_directory_is_written_once_and_anew_when_what_it_depends_on_changes(tmp_path: Path) -> None:
    random_model = load("random_model")
    tiny = random_model.Shape("tiny", 16, 24, 1, 2, 1, 32, 64)
    wider = random_model.Shape("tiny", 16, 32, 1, 2, 1, 32, 64)

    first = random_model.checkpoint(tmp_path, tiny)
    again = random_model.checkpoint(tmp_path, tiny)
    other = random_model.checkpoint(tmp_path, wider)

    assert first == again != other
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([first.name, other.name])
    assert sorted(path.name for path in first.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_the_floor_is_one_read_per_step_with_a_token_for_each_row() -> None:
    floor = load("random_model").floor_tokens_per_s

    assert floor(8, 1_000_000_000, 50e9) == 400.0


def test_a_step_reads_each_adapter_beside_the_weights() -> None:
    weights, both = load("vs_peft").step_bytes(8, "bfloat16")

    assert weights == 2 * 494_032_768
    assert both - weights == 8 * 2 * 8_798_208  # what PEFT counts for rank 16 on all seven projections


def test_the_decode_rate_counts_what_comes_after_the_last_first_token() -> None:
    decode_rate = load("batches").decode_rate

    early, late = [(1.0, 1), (2.0, 1), (4.0, 2)], [(2.0, 1), (3.0, 3)]

    assert decode_rate([early, late], ended_s=4.5) == (2 + 3) / 2.5


def test_adapters_are_dealt_in_turn_and_no_names_mean_the_base() -> None:
    deal = load("batches").deal

    assert [request.adapter for request in deal([[1], [2], [3]], ["a", "b"])] == ["a", "b", "a"]
    assert [request.adapter for request in deal([[1], [2]], [])] == [None, None]


def test_the_first_token_that_differs_is_found() -> None:
    first_difference = load("vs_peft").first_difference

    assert first_difference([[1, 2], [3, 4]], [[1, 2], [3, 4]]) is None
    assert first_difference([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == (1, 1)
    assert first_difference([[1, 2]], [[1]]) == (0, 1)


def test_a_case_has_at_most_one_adapter_per_request() -> None:
    parse_case = load("vs_peft").parse_case

    assert str(parse_case("8x2")) == "8x2"
    for text in ("2x8", "0x0", "8", "8x"):
        with pytest.raises(ArgumentTypeError):
            parse_case(text)


def test_each_number_of_requests_is_held_against_its_own_base() -> None:
    cases = load("lora_tax").cases_of([1, 32, 200], num_requests=32)

    assert [(case.num_requests, case.num_adapters, case.label) for case in cases] == [
        (32, 0, "no LoRA"),
        (32, 0, "idle"),
        (32, 1, "1 adapter"),
        (32, 32, "32 adapters"),
        (200, 0, "no LoRA"),
        (200, 0, "idle"),
        (200, 200, "200 adapters"),
    ]


def test_columns_of_a_table_are_aligned() -> None:
    lines = load("report").table(["what", "tokens/s"], [["a", "1.0"], ["longer", "1000"]]).splitlines()

    assert lines == ["what    tokens/s", "a            1.0", "longer      1000"]


def test_a_missing_number_is_a_dash() -> None:
    report = load("report")

    assert report.figures(report.median([])) == "–"
    assert report.ratio(1.0, float("nan")) == "–"
    assert [report.figures(value) for value in (123.4, 12.34, 1.234)] == ["123", "12.3", "1.23"]


def test_ratios_are_taken_turn_by_turn() -> None:
    paired_ratio = load("report").paired_ratio

    assert paired_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 2.0]) == "2.00×"
    assert paired_ratio([2.0], []) == "–"


def test_a_stored_run_says_where_it_is_from_and_names_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    monkeypatch.setattr(sys, "argv", ["benchmarks/some.py", "--repeats", "2", "--results", str(results)])
    report = load("report").Report("some", Namespace(repeats=2, results=results))

    stored = report.save({"tokens_per_s": [1.5]}, results).read_text()

    content = json.loads(stored)
    assert content["command"] == "python benchmarks/some.py --repeats 2 --results PATH"
    assert content["settings"] == {"repeats": 2}
    assert content["results"] == {"tokens_per_s": [1.5]}
    assert content["machine"]["cores"] >= 1
    assert "torch" in content["versions"]
    assert str(tmp_path) not in stored


@pytest.mark.parametrize("subprotocol", SUBPROTOCOLS)
@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 300])
def test_the_reader_counts_what_a_server_sends(subprotocol: str, num_tokens: int) -> None:
    client = load("stream_client")
    encode = encoder_for(subprotocol)
    messages: list[Any] = [
        Accepted(request_id="r", seed=1, num_prompt_tokens=2),
        Delta(request_id="r", choice=0, index=0, text="x" * 70, token_ids=[300] * num_tokens),
        Delta(request_id="r", choice=0, index=0, text="é" * 70_000, token_ids=[7, 70_000]),
    ]
    payloads = [frame if isinstance(frame, bytes) else frame.encode() for frame in map(encode, messages)]

    tally = client.Tally()
    data = b"".join(Frame(Opcode.BINARY, payload).serialize(mask=False) for payload in payloads)
    assert client.scan(data, tally) == len(data)

    assert tally == client.Tally(3, sum(map(len, payloads)), num_tokens + 2, num_accepted=1)


def test_the_reader_leaves_a_frame_until_it_is_whole() -> None:
    client = load("stream_client")
    data = b"".join(Frame(Opcode.TEXT, b"x" * size).serialize(mask=False) for size in (5, 125, 126, 300, 65_536))

    tally, rest = client.Tally(), b""
    for at in range(0, len(data), 3):
        rest += data[at : at + 3]
        rest = rest[client.scan(rest, tally) :]

    assert (tally.num_frames, tally.num_bytes, rest) == (5, 5 + 125 + 126 + 300 + 65_536, b"")


def test_the_reader_takes_note_of_ends() -> None:
    client = load("stream_client")
    frames = [
        Frame(Opcode.TEXT, b'{"type":"done"}'),
        Frame(Opcode.TEXT, b'{"type":"error"}'),
        Frame(Opcode.PING, b"done"),
        Frame(Opcode.CLOSE, b"\x03\xe8"),
    ]

    tally = client.Tally()
    client.scan(b"".join(frame.serialize(mask=False) for frame in frames), tally)

    assert (tally.num_ended, tally.num_frames) == (3, 2)


@pytest.mark.parametrize("size", [0, 125, 126, 400])
def test_the_reader_writes_frames_that_a_server_can_read(size: int) -> None:
    protocol = ServerProtocol(state=State.OPEN)

    protocol.receive_data(load("stream_client").frame(2, b"y" * size))

    (frame,) = protocol.events_received()
    assert isinstance(frame, Frame)
    assert (frame.opcode, frame.data) == (Opcode.BINARY, b"y" * size)


def test_a_streaming_case_has_a_stream_for_each_connection() -> None:
    parse_case = load("streaming").parse_case

    assert parse_case("1000x100") == (1000, 100)
    for text in ("1x100", "2000x1", "1x0", "x"):
        with pytest.raises(ArgumentTypeError):
            parse_case(text)


def test_a_floor_is_the_longer_of_moving_and_multiplying() -> None:
    machine = load("kernels").Machine(bandwidth=10.0, products=100.0, cache_bytes=64)

    assert (machine.floor(50.0, 100.0), machine.floor(10.0, 1000.0)) == (5.0, 10.0)
    assert [machine.num_copies(size) for size in (1, 60, 128, 1000)] == [128, 3, 1, 1]


def test_alternatives_of_an_op_compute_the_same() -> None:
    kernels = load("kernels")
    machine = kernels.Machine(bandwidth=1.0, products=1.0, cache_bytes=1)
    adapters = kernels.Adapters(machine, torch.float32, 3, 24, (40, 8))
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))

    results = {name: torch.zeros(6, 48) for name in adapters.contestants(torch.empty(0), x)}
    for name, y in results.items():
        adapters.contestants(y, x)[name](0)

    kernels.check(results["add_lora"], results)
    with pytest.raises(SystemExit, match="dense"):
        kernels.check(results["add_lora"], {"dense": results["dense, masked"].flip(0)})

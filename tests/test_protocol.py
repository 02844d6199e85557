"""The wire format: committed frames stay valid, and each side is as strict as it promises."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import msgspec
import msgspec.inspect
import pytest
from hypothesis import given
from hypothesis import strategies as st

from descant_client import errors
from descant_client.errors import AdapterNotFound, DescantError, InvalidRequest, from_wire
from descant_client.lifecycle import (
    AdapterInfo,
    Adapters,
    Combination,
    CreateAdapter,
    DestroyAdapter,
    DisableAdapter,
    EnableAdapter,
    ForkAdapter,
    LoadAdapter,
    MergeAdapters,
    MergeAndSave,
    PinAdapter,
    SaveAdapter,
    UnpinAdapter,
)
from descant_client.protocol import (
    JSON_SUBPROTOCOL,
    MSGPACK_SUBPROTOCOL,
    Accepted,
    Ack,
    Cancel,
    ChatMessage,
    ChoiceEnd,
    ClientMessage,
    Delta,
    Done,
    Error,
    Generate,
    Hello,
    Limits,
    ListAdapters,
    ListModels,
    MergedAdapters,
    ModelInfo,
    Models,
    OpenAdapter,
    Progress,
    Resume,
    SamplingParams,
    ServerMessage,
    TokenLogprob,
    TopLogprob,
    Usage,
    decode_client,
    decode_server,
    encoder_for,
    request_id_of,
)
from descant_client.timings import Timings
from descant_client.wire import WeightedAdapter

GOLDEN = Path(__file__).parent / "golden"
SAMPLING = SamplingParams(0.5, 40, 0.9, 0.05, 0.95, 1.1, 0.2, -0.2, {7: -1.5})
FULL = {"n": 2, "seed": 2**63 - 1, "stop": ["\n", "é"], "stop_token_ids": [2], "ignore_eos": True}
FULL |= {"logprobs": 0, "prompt_logprobs": 3}
MODEL = ModelInfo("demo", 2048, 512, "float32", "cpu")
LOGPROB = TokenLogprob(5, "a", -0.25, [TopLogprob(5, "a", -0.25), TopLogprob(6, "b", -1.5)])
USAGE, TIMINGS = Usage(3, 2, 1), Timings(0.125, 0.25, 0.5, 1)

MEMBERS = [WeightedAdapter("a", 0.5), WeightedAdapter("b", -1.0)]
TIES = Combination("ties_svd", 4, 0.75, 0.5, "frequency", 7)

# File name in tests/golden -> the message in it. A released frame is never changed: add another.
CLIENT_FRAMES: dict[str, ClientMessage] = {
    "generate_prompt": Generate("1", prompt="hé"),
    "generate_token_ids": Generate(
        "1", token_ids=[1, 2, 3], adapter="reverse", sampling=SAMPLING, max_tokens=9, **FULL
    ),
    "generate_messages": Generate("1", messages=[ChatMessage("user", "hi")], adapter="org/repo", adapter_source="hub"),
    "generate_sum": Generate("1", prompt="x", adapters=MEMBERS),
    "generate_combination": Generate("1", prompt="x", adapters=MEMBERS, combination=TIES),
    "generate_merged": Generate("1", prompt="x", merged_adapters=MergedAdapters(["a"], [0.5], "ties", 0.5, "total")),
    "generate_merged_plain": Generate("1", prompt="x", merged_adapters=MergedAdapters(["a", "b"])),
    "generate_deadlines": Generate("1", prompt="x", queue_timeout_s=0.5, timeout_s=60.0),
    "cancel": Cancel("1"),
    "resume": Resume("1", {0: 5, 1: 0}),
    "resume_from_start": Resume("1"),
    "ack": Ack("1"),
    "adapter_list": ListAdapters("2"),
    "adapter_open": OpenAdapter("2", "reverse"),
    "models_list": ListModels("2"),
    "adapter_create": CreateAdapter("3", "a", 4, 8.0, ["q_proj", "o_proj"], True),
    "adapter_create_plain": CreateAdapter("3", "a"),
    "adapter_fork": ForkAdapter("3", "a", "b", True),
    "adapter_load": LoadAdapter("3", "a", "org/repo@main", "hub", True),
    "adapter_load_plain": LoadAdapter("3", "a", "/adapters/a"),
    "adapter_merge": MergeAdapters("3", "c", MEMBERS, "local", TIES, True),
    "adapter_merge_plain": MergeAdapters("3", "c", MEMBERS),
    "adapter_save": SaveAdapter("3", "a", "/saved/a"),
    "adapter_merge_and_save": MergeAndSave("3", "a", "/saved/é"),
    "adapter_pin": PinAdapter("3", "a"),
    "adapter_unpin": UnpinAdapter("3", "a"),
    "adapter_enable": EnableAdapter("3", "a"),
    "adapter_disable": DisableAdapter("3", "a"),
    "adapter_destroy": DestroyAdapter("3", "a"),
}
SERVER_FRAMES: dict[str, ServerMessage] = {
    "hello": Hello("1.0", "descant/0.1.0", "s1", ["resume"], Limits(4194304, 256, 16, 60.0), MODEL),
    "accepted": Accepted("1", 7, 3, "abc"),
    "accepted_base": Accepted("1", 7, 3),
    "progress": Progress("1", "preparing_adapter"),
    "delta": Delta("1", 0, 4, "hé", [5, 6]),
    "delta_logprobs": Delta("1", 1, 0, "a", [5], [LOGPROB]),
    "done": Done("1", 7, [ChoiceEnd(0, "stop", 2), ChoiceEnd(1, "length", 9, "é")], USAGE, TIMINGS),
    "done_prompt_logprobs": Done("1", 7, [ChoiceEnd(0, "cancelled", 0)], USAGE, TIMINGS, [None, LOGPROB]),
    "error": Error("adapter_not_found", "No adapter.", "1", {"adapter": "x"}),
    "error_connection": Error("draining", "Going away."),
    "adapters": Adapters("2", [AdapterInfo("a", "local", "abc", 8, 1024), AdapterInfo("b", "hub")]),
    "adapters_marks": Adapters("3", [AdapterInfo("a", "fork", "abc", 8, 1024, True, True, False)]),
    "adapters_none": Adapters("3", []),
    "models": Models("2", [MODEL]),
}


@pytest.mark.parametrize("name", CLIENT_FRAMES)
def test_frames_of_clients_stay_valid(name: str) -> None:
    message = CLIENT_FRAMES[name]
    for path, subprotocol in _paths(name):
        frame = _read(path)
        assert decode_client(frame) == message
        assert encoder_for(subprotocol)(message) == frame


@pytest.mark.parametrize("name", SERVER_FRAMES)
def test_frames_of_servers_stay_valid(name: str) -> None:
    message = SERVER_FRAMES[name]
    for path, subprotocol in _paths(name):
        frame = _read(path)
        assert decode_server(frame) == message
        assert encoder_for(subprotocol)(message) == frame


def _paths(name: str) -> list[tuple[Path, str]]:
    return [(GOLDEN / f"{name}.json", JSON_SUBPROTOCOL), (GOLDEN / f"{name}.msgpack", MSGPACK_SUBPROTOCOL)]


def _read(path: Path) -> str | bytes:
    return path.read_text("utf-8") if path.suffix == ".json" else path.read_bytes()


def test_every_message_has_a_golden_frame_and_every_file_a_test() -> None:
    assert {type(message) for message in CLIENT_FRAMES.values()} == set(get_args(ClientMessage))
    assert {type(message) for message in SERVER_FRAMES.values()} == set(get_args(ServerMessage))
    names = [*CLIENT_FRAMES, *SERVER_FRAMES]
    expected = {f"{name}.{ending}" for name in names for ending in ("json", "msgpack")}
    assert {path.name for path in GOLDEN.iterdir()} == expected


@pytest.mark.parametrize("name", [*CLIENT_FRAMES, *SERVER_FRAMES])
def test_both_encodings_say_the_same(name: str) -> None:
    json, msgpack = (_read(path) for path, _ in _paths(name))
    as_json = msgspec.json.decode(json)
    as_msgpack = msgspec.msgpack.decode(msgpack, strict=False)
    assert msgspec.json.decode(msgspec.json.encode(as_msgpack)) == as_json


@pytest.mark.parametrize(
    ("frame", "where"),
    [
        ('{"type":"generate","request_id":"1","prompt":"x","colour":"red"}', "colour"),
        ('{"type":"generate","request_id":"1","sampling":{"temprature":1}}', "temprature"),
        ('{"type":"generate","request_id":"1","sampling":{"temperature":-1}}', "sampling.temperature"),
        ('{"type":"generate","request_id":"1","token_ids":[1,-2]}', "token_ids"),
        ('{"type":"generate","request_id":""}', "request_id"),
        ('{"type":"resume","request_id":"1","have":{"0":-1}}', "have"),
        ('{"type":"adapter.create","request_id":"1","name":"a","ranks":4}', "ranks"),
        ('{"type":"adapter.create","request_id":"1","name":"a","rank":0}', "rank"),
        ('{"type":"adapter.merge","request_id":"1","name":"a","adapters":[]}', "adapters"),
        (
            '{"type":"adapter.merge","request_id":"1","name":"a","adapters":[["b",1]],"combination":{"type":"x"}}',
            "type",
        ),
        ('{"type":"generate","request_id":"1","prompt":"x","timeout_s":0}', "timeout_s"),
        ('{"type":"sing","request_id":"1"}', "type"),
        ('{"type":"generate"}', "request_id"),
        ("[]", "frame"),
        ("no json", "frame"),
        (b"\xc1", "frame"),
        ("[" * 100_000, "frame"),
    ],
)
def test_a_server_refuses_by_name_what_it_does_not_know(frame: str | bytes, where: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_client(frame)
    assert where in str(caught.value)


@pytest.mark.parametrize("kind", get_args(ClientMessage), ids=lambda kind: kind.__name__)
def test_every_integer_of_a_client_has_bounds_within_64_bits(kind: type) -> None:
    integers = list(_integers(msgspec.inspect.type_info(kind)))

    for one in integers:
        low = one.ge if one.gt is None else one.gt
        high = one.le if one.lt is None else one.lt
        assert low is not None
        assert high is not None
        assert -(2**63) <= low <= high < 2**63
    assert integers or kind.__name__ not in ("Generate", "Resume", "CreateAdapter", "MergeAdapters")


def _integers(value: object) -> Iterator[msgspec.inspect.IntType]:
    """Yield every integer in a type, however deep."""
    if isinstance(value, msgspec.inspect.IntType):
        yield value
    elif isinstance(value, msgspec.inspect.Type | msgspec.inspect.Field):
        yield from _integers([getattr(value, name) for name in value.__struct_fields__ if name != "default"])
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _integers(one)


@pytest.mark.parametrize("number", [2**63, 2**64 - 1, 2**64, 2**70, -(2**70)])
def test_a_number_that_no_machine_word_holds_is_refused_by_name(number: int) -> None:
    frames = {
        "rank": f'{{"type":"adapter.create","request_id":"1","name":"a","rank":{number}}}',
        "max_tokens": f'{{"type":"generate","request_id":"1","prompt":"x","max_tokens":{number}}}',
        "top_k": f'{{"type":"generate","request_id":"1","prompt":"x","sampling":{{"top_k":{number}}}}}',
        "seed": f'{{"type":"generate","request_id":"1","prompt":"x","seed":{number}}}',
        "have": f'{{"type":"resume","request_id":"1","have":{{"{number}":1}}}}',
    }
    for where, frame in frames.items():
        with pytest.raises(InvalidRequest, match=where):
            decode_client(frame)


def test_a_refused_frame_still_names_its_request() -> None:
    assert request_id_of('{"type":"generate","request_id":"7","colour":"red"}') == "7"
    assert request_id_of(msgspec.msgpack.encode({"type": "sing", "request_id": "7"})) == "7"
    assert request_id_of('{"type":"generate","request_id":7}') is None
    assert request_id_of("no json") is None


def test_a_client_ignores_unknown_messages_and_fields() -> None:
    assert decode_server('{"type":"weather","sky":"blue"}') is None
    assert decode_server(msgspec.msgpack.encode({"type": "weather"})) is None
    frame = '{"type":"accepted","request_id":"1","seed":1,"num_prompt_tokens":2,"mood":{"a":[1]}}'
    assert decode_server(frame) == Accepted("1", 1, 2)


@pytest.mark.parametrize("frame", ["no json", b"\xc1", '{"type":"accepted","request_id":"1","seed":"x"}'])
def test_a_client_does_not_ignore_what_is_broken(frame: str | bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_server(frame)


@given(st.text(), st.lists(st.integers(0, 2**31 - 1)), st.integers(0, 63), st.integers(0, 2**31))
def test_any_delta_survives_both_encodings(text: str, token_ids: list[int], choice: int, index: int) -> None:
    delta = Delta("1", choice, index, text, token_ids)
    for subprotocol in (JSON_SUBPROTOCOL, MSGPACK_SUBPROTOCOL):
        assert decode_server(encoder_for(subprotocol)(delta)) == delta


@given(st.dictionaries(st.integers(0, 63), st.integers(0, 2**31 - 1)))
def test_any_resume_survives_both_encodings(have: dict[int, int]) -> None:
    for subprotocol in (JSON_SUBPROTOCOL, MSGPACK_SUBPROTOCOL):
        assert decode_client(encoder_for(subprotocol)(Resume("1", have))) == Resume("1", have)


LEAVES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DescantError)]


@pytest.mark.parametrize("kind", [kind for kind in LEAVES if kind.fields], ids=lambda kind: kind.code)
def test_every_error_survives_the_wire(kind: type[DescantError]) -> None:
    error = kind(*[f"value {i}" for i in range(len(kind.fields))])
    frame = msgspec.json.encode(Error(error.code, str(error), "1", error.data())).decode()
    message = decode_server(frame)
    assert isinstance(message, Error)
    again = from_wire(message.code, message.message, message.data)
    assert (type(again), again.data(), str(again)) == (kind, error.data(), str(error))


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_an_error_takes_its_fields_by_position_and_by_keyword_and_survives_copies(kind: type[DescantError]) -> None:
    values = {name: f"value {name}" for name in kind.fields}
    by_position, by_keyword = kind(*values.values()), kind(**values)

    for error in (by_position, by_keyword, copy.copy(by_position), pickle.loads(pickle.dumps(by_keyword))):
        assert (type(error), error.data(), error.args) == (kind, values, ())
        assert {name: getattr(error, name) for name in kind.fields} == values


def test_an_error_refuses_fields_it_does_not_have() -> None:
    with pytest.raises(TypeError, match="reason"):
        AdapterNotFound(adapter="x", reason="y")  # type: ignore[call-arg]


def test_codes_of_errors_are_unique() -> None:
    codes = [kind.code for kind in LEAVES if kind.fields]
    assert len(codes) == len(set(codes))

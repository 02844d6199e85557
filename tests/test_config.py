"""Settings: an unknown one is an error that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from descant.config import (
    AdapterConfig,
    AdapterEntry,
    Config,
    KeyConfig,
    ServerConfig,
    check_config,
    hash_key,
    is_loopback,
    load_config,
)
from descant_client.errors import ConfigInvalid

HASH = "0" * 64


def _load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "descant.toml"
    path.write_text(text)
    return load_config(path)


def test_a_file_sets_what_it_names_and_leaves_the_rest(tmp_path: Path) -> None:
    config = _load(
        tmp_path,
        f"""
        [server]
        port = 9000
        [model]
        path = "org/model"
        dtype = "bfloat16"
        [[adapters.entries]]
        name = "upper"
        ref = "./upper"
        [[keys]]
        name = "ann"
        sha256 = "{HASH}"
        roots = ["/srv"]
        """,
    )

    assert (config.server.port, config.server.host, config.model.dtype) == (9000, "127.0.0.1", "bfloat16")
    assert config.adapters.entries == [AdapterEntry(name="upper", ref="./upper")]
    assert config.keys == [KeyConfig(name="ann", sha256=HASH, roots=["/srv"])]


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert _load(tmp_path, "") == Config()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prot = 1", "prot"),
        ("[server]\nprot = 1", "prot"),
        ("[[keys]]\nname = 'a'\nsecret = 'b'", "keys"),
        ("[server]\nport = 'x'", "server.port"),
        ("[server]\nport = 70000", "server.port"),
        ("[server]\nresume_window_s = -1", "server.resume_window_s"),
        ("[model]\ndtype = 'int4'", "model.dtype"),
        ("[model]\nengine = 'vllm'", "model.engine"),
        ("[model]\nkv_bytes = 0", "model.kv_bytes"),
        ("[scheduling]\nmax_num_seqs = 0", "scheduling.max_num_seqs"),
        ("[[keys]]\nname = 'a'\nsha256 = 'plain text'", "sha256"),
        ("server = 3", "server"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigInvalid) as refusal:
        _load(tmp_path, text)

    assert named in str(refusal.value)


@pytest.mark.parametrize("text", ["[server", "\x00"])
def test_what_is_no_toml_is_said_with_the_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigInvalid, match=r"descant\.toml"):
        _load(tmp_path, text)


def test_a_missing_file_and_one_that_is_no_text_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="No such file"):
        load_config(tmp_path / "nothing.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigInvalid, match=r"binary\.toml"):
        load_config(tmp_path / "binary.toml")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_other_machines_need_a_key_and_are_told_how_to_get_one(host: str) -> None:
    server = ServerConfig(host=host)

    with pytest.raises(ConfigInvalid, match="`descant key NAME`"):
        check_config(Config(server=server))
    check_config(Config(server=server, keys=[KeyConfig(name="ann", sha256=HASH)]))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_this_machine_needs_none(host: str) -> None:
    check_config(Config(server=ServerConfig(host=host)))


def test_a_name_that_only_begins_like_loopback_is_not_loopback() -> None:
    assert not is_loopback("127.0.0.1.example.org")
    assert not is_loopback("localhost.example.org")


def test_no_name_is_used_twice() -> None:
    keys = [KeyConfig(name="ann", sha256=HASH), KeyConfig(name="ann", sha256="1" * 64)]
    entries = [AdapterEntry(name="upper", ref="/a"), AdapterEntry(name="upper", ref="/b")]

    with pytest.raises(ConfigInvalid, match="'ann'"):
        check_config(Config(keys=keys))
    with pytest.raises(ConfigInvalid, match="'upper'"):
        check_config(Config(adapters=AdapterConfig(entries=entries)))


def test_a_key_is_known_by_its_sha256() -> None:
    assert hash_key("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

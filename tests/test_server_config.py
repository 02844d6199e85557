"""The server's settings, the command line that overrides them, and the roots of local adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from descant.actors.gateway import open_listener
from descant.cli.app import cli
from descant.config import AdapterConfig, AdapterEntry, Config, check_config, load_config
from descant.sources.local import find_adapter
from descant_client.errors import AdapterForbidden, ConfigInvalid


def config_of(path: Path, text: str) -> Config:
    """Read a file with this content."""
    path.write_text(text)
    return load_config(path)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[server]\nresume_window_s = -1", "$.server.resume_window_s"),
        ("[model]\ndummy_tokens_per_s = -0.5", "$.model.dummy_tokens_per_s"),
    ],
)
def test_a_duration_or_pace_below_zero_is_refused_by_its_key(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(ConfigInvalid) as raised:
        config_of(tmp_path / "a.toml", text)

    assert raised.value.data()["key"] == key


@pytest.mark.parametrize("names", [["a", "a"], ["org/a"], [""], ["./a"]])
def test_a_name_that_no_request_could_say_is_refused(names: list[str]) -> None:
    entries = [AdapterEntry(name=name, ref="./a") for name in names]

    with pytest.raises(ConfigInvalid):
        check_config(Config(adapters=AdapterConfig(entries=entries)))


@pytest.mark.parametrize("port", [70000, -1])
def test_a_port_that_does_not_exist_is_refused(port: int) -> None:
    with pytest.raises(ConfigInvalid):
        open_listener("127.0.0.1", port)

    assert CliRunner().invoke(cli, ["serve", "--port", str(port)]).exit_code == 2


@pytest.mark.parametrize("name", ["alice", 'a"b\\'])
def test_the_lines_of_a_new_key_can_be_pasted_into_the_settings(tmp_path: Path, name: str) -> None:
    lines = CliRunner().invoke(cli, ["key", name]).output

    assert [key.name for key in config_of(tmp_path / "a.toml", lines).keys] == [name]


def test_a_link_among_an_adapters_files_may_not_lead_out_of_the_roots(tmp_path: Path) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret.safetensors"
    (root / "mine").mkdir(parents=True)
    (root / "mine" / "adapter_config.json").symlink_to(root / "shared.json")
    assert find_adapter("mine", str(root / "mine"), [str(root)]) == root / "mine"

    (root / "mine" / "adapter_model.safetensors").symlink_to(secret)

    with pytest.raises(AdapterForbidden):
        find_adapter("mine", str(root / "mine"), [str(root)])
    assert find_adapter("mine", str(root / "mine"), None) == root / "mine"

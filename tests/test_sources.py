"""Where models come from: a real HTTP server that speaks as much of the Hub's interface as downloading needs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from descant.sources.local import find_adapter, find_target
from descant_client.errors import AdapterForbidden, AdapterNotFound, InvalidRequest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    files: ClassVar[dict[str, bytes]] = {
        "config.json": b"{}",
        "model.safetensors": b"weights",
        "pytorch_model.bin": b"a pickle",
        "modeling_evil.py": b"code",
    }

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def _answer(self, *, has_body: bool) -> None:
        if not self.path.startswith(("/api/models/org/model", "/org/model")):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = self._body()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if has_body:
            self.wfile.write(body)

    def _body(self) -> bytes:
        if "/tree/" in self.path:
            return json.dumps(
                [{"type": "file", "path": n, "size": len(b), "oid": "0"} for n, b in self.files.items()]
            ).encode()
        if self.path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in self.files]
            return json.dumps({"id": "org/model", "sha": COMMIT, "siblings": siblings}).encode()
        return self.files[self.path.rpartition("/")[2]]


DOWNLOAD = """
import sys
from descant.sources.hub import download_model
from descant_client.errors import DescantError
try:
    print(download_model(sys.argv[1], None))
except DescantError as error:
    print(error.code)
"""


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    """A Hub on loopback."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def download(hub: ThreadingHTTPServer, cache: Path, model: str) -> str:
    """Download in a process of its own: the Hub client reads its settings once. Return a path or an error code."""
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-c", DOWNLOAD, model]
    return subprocess.run(command, env=os.environ | settings, check=True, capture_output=True, text=True).stdout.strip()


def test_a_model_is_downloaded_without_pickles_and_code(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    directory = Path(download(hub, tmp_path, "org/model"))

    assert {path.name for path in directory.iterdir()} == {"config.json", "model.safetensors"}
    assert (directory / "model.safetensors").read_bytes() == b"weights"


def test_a_model_that_does_not_exist_is_refused(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    assert download(hub, tmp_path, "org/other") == "model_invalid"


def test_a_hub_that_is_gone_is_needed_only_for_what_is_not_cached(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    first = download(hub, tmp_path, "org/model")
    hub.shutdown()
    hub.server_close()

    assert download(hub, tmp_path, "org/model") == first
    assert download(hub, tmp_path, "org/other") == "source_unavailable"


def test_a_directory_below_a_root_is_found(tmp_path: Path) -> None:
    (tmp_path / "root/adapter").mkdir(parents=True)

    assert find_adapter("a", f"{tmp_path}/root/adapter", [f"{tmp_path}/root"]) == tmp_path / "root/adapter"


@pytest.mark.parametrize("path", ["root/../other", "other", "root/link", "missing"])
def test_a_directory_outside_the_roots_is_forbidden_whether_it_exists_or_not(tmp_path: Path, path: str) -> None:
    for name in ("root", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "root/link").symlink_to(tmp_path / "other")

    with pytest.raises(AdapterForbidden):
        find_adapter("a", f"{tmp_path}/{path}", [f"{tmp_path}/root"])


@pytest.mark.parametrize("path", ["{root}/missing", "{root}/" + "x" * 5000, "{root}/nul\0", "~nobody-of-that-name/x"])
def test_a_directory_that_does_not_exist_is_not_found(tmp_path: Path, path: str) -> None:
    with pytest.raises(AdapterNotFound):
        find_adapter("a", path.format(root=tmp_path), None)


def test_a_directory_whose_name_is_no_text_is_not_found(tmp_path: Path) -> None:
    target = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.mkdir(target)
    (tmp_path / "link").symlink_to(target)

    with pytest.raises(AdapterNotFound):
        find_adapter("a", f"{tmp_path}/link", None)
    with pytest.raises(InvalidRequest):
        find_target("a", f"{tmp_path}/link/new", None)


def test_a_target_need_not_exist_and_is_what_links_lead_to(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "root")

    assert find_target("a", f"{tmp_path}/link/new/dir", [f"{tmp_path}/root"]) == tmp_path / "root/new/dir"
    assert find_target("a", f"{tmp_path}/anywhere", None) == tmp_path / "anywhere"


@pytest.mark.parametrize("path", ["root/../new", "new", "root/link/new", "root/link", "root/loop/new"])
def test_a_target_outside_the_roots_is_forbidden(tmp_path: Path, path: str) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link").symlink_to(tmp_path)
    (tmp_path / "root/loop").symlink_to(tmp_path / "root/loop")

    with pytest.raises(AdapterForbidden):
        find_target("a", f"{tmp_path}/{path}", [f"{tmp_path}/root"])


@pytest.mark.parametrize("path", ["", "relative", "./x", "~/x", "/nul\0"])
def test_a_target_is_an_absolute_path(path: str) -> None:
    with pytest.raises(InvalidRequest):
        find_target("a", path, ["/"])

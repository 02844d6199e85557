"""The house rules that a machine can check."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"runtime": "descant", "kernels": "descant_kernels", "clients": "descant_client"}
SOURCES = [path for folder, package in PACKAGES.items() for path in (ROOT / folder / package).rglob("*.py")]
TESTS = sorted((ROOT / "tests").glob("*.py"))
MAX_LINES, MAX_FUNCTION_LINES, MAX_KERNEL_LINES = 350, 40, 120
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "tools", "base_utils"}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


@pytest.mark.parametrize(("folder", "package"), PACKAGES.items())
def test_each_root_holds_exactly_one_package_and_is_none_itself(folder: str, package: str) -> None:
    entries = {entry.name for entry in (ROOT / folder).iterdir() if entry.name != "__pycache__"}

    assert entries == {package}
    assert (ROOT / folder / package / "__init__.py").is_file()
    assert (ROOT / folder / package / "py.typed").is_file()


def test_every_folder_of_sources_is_a_package() -> None:
    assert [_name(path.parent) for path in SOURCES if not (path.parent / "__init__.py").exists()] == []


def test_no_file_is_longer_than_a_reader_likes() -> None:
    num_lines = {_name(path): len(path.read_text("utf-8").splitlines()) for path in [*SOURCES, *TESTS]}

    assert {name: num for name, num in num_lines.items() if num > MAX_LINES} == {}


def test_no_function_is_longer_than_a_screen() -> None:
    too_long = []
    for path in SOURCES:
        limit = MAX_KERNEL_LINES if "descant_kernels" in path.parts else MAX_FUNCTION_LINES
        for node in ast.walk(_parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or 0) - node.body[0].lineno + 1
                too_long += [f"{_name(path)}::{node.name} {num_lines}"] if num_lines > limit else []

    assert too_long == []


def test_no_file_is_named_for_what_it_is_not() -> None:
    assert [_name(path) for path in [*SOURCES, *TESTS] if path.stem in BANNED_NAMES] == []


def test_every_module_says_what_it_is_about() -> None:
    assert [_name(path) for path in SOURCES if not ast.get_docstring(_parsed(path))] == []


def test_everything_public_has_a_docstring_or_one_in_its_base() -> None:
    missing = []
    for path in SOURCES:
        for node in _parsed(path).body:
            is_public = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if is_public and not node.name.startswith("_") and ast.get_docstring(node) is None:
                missing.append(f"{_name(path)}::{node.name}")

    assert missing == []


def test_nothing_is_left_to_do_in_comments() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "XX" + "X")

    assert [_name(path) for path in SOURCES if any(mark in path.read_text("utf-8") for mark in marks)] == []

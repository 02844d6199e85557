"""The arrows between packages and actors go one way, and neither the client nor the server process needs torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import layers

ROOT = Path(__file__).parent.parent
SOURCES = {
    "descant": ROOT / "runtime" / "descant",
    "descant_kernels": ROOT / "kernels" / "descant_kernels",
    "descant_client": ROOT / "clients" / "descant_client",
}
ASYNC = {"asyncio", "anyio", "trio", "uvloop"}
SERVER_ONLY = {
    "uvicorn",
    "starlette",
    "tokenizers",
    "jinja2",
    "safetensors",
    "huggingface_hub",
    "platformdirs",
    "numpy",
}
# Run in the children; everything else of `descant` may be imported by the server process.
CHILD_ONLY = (
    "descant.engine",
    "descant.adapters",
    "descant.versions",
    "descant.model.base_model",
    "descant.model.checkpoint",
    "descant.actors.worker",
    "descant.cli.doctor",
)


def _modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    modules: dict[str, Path] = {}
    for package, directory in SOURCES.items():
        for path in directory.rglob("*.py"):
            parts = path.relative_to(directory).with_suffix("").parts
            modules[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return modules


MODULES = _modules()


@cache
def _imports(module: str) -> set[str]:
    """Every module that the source of `module` names in an import, wherever in the file it stands."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            imported |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return imported


def _offenders(prefix: str, forbidden: set[str]) -> dict[str, set[str]]:
    """Modules at or below `prefix` that import something at or below a forbidden one."""
    found: dict[str, set[str]] = {}
    for module in MODULES:
        if _is_within(module, prefix):
            bad = {name for name in _imports(module) if any(_is_within(name, other) for other in forbidden)}
            found |= {module: bad} if bad else {}
    return found


def _is_within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def test_there_is_something_to_look_at() -> None:
    assert len(MODULES) > 50
    assert "descant_client.errors" in _imports("descant.assembly.system")


@pytest.mark.parametrize("package", ["descant_client", "descant_kernels"])
def test_what_is_below_never_imports_the_server(package: str) -> None:
    assert _offenders(package, {"descant"}) == {}


def test_the_client_needs_neither_kernels_nor_torch_nor_anything_of_the_servers() -> None:
    assert _offenders("descant_client", {"descant_kernels", "torch", "triton", *SERVER_ONLY}) == {}


def test_kernels_do_not_know_the_client() -> None:
    assert _offenders("descant_kernels", {"descant_client"} | ASYNC) == {}


def test_every_import_goes_down_from_folder_to_folder() -> None:
    assert layers.upward_arrows() == []


def test_every_module_has_its_place_in_the_order() -> None:
    assert [module for module in layers.modules() if module and layers.unit_of(module) is None] == []


def test_no_folder_holds_more_than_a_reader_can_look_over() -> None:
    folders = {path.parent for path in MODULES.values()}
    assert {folder: num for folder in folders if (num := len(list(folder.glob("*.py"))) - 1) > 20} == {}


def test_scheduling_is_pure() -> None:
    assert _offenders("descant.scheduling", {"torch", "numpy", "threading", "time", "descant_kernels"} | ASYNC) == {}


@pytest.mark.parametrize("folder", ["contract", "model", "versions", "engine", "adapters"])
def test_what_computes_waits_for_nothing(folder: str) -> None:
    assert _offenders(f"descant.{folder}", ASYNC) == {}


def test_actors_do_not_import_each_other() -> None:
    assert _offenders("descant.actors", {"descant.actors"}) == {}


def test_only_what_runs_in_children_names_torch() -> None:
    assert [module for module in _offenders("descant", {"torch"}) if not module.startswith(CHILD_ONLY)] == []
    assert "descant.engine.dummy" not in _offenders("descant.engine", {"torch"})


def _python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_client_and_command_line_work_without_torch_and_without_the_servers_dependencies() -> None:
    blocked = sorted({"torch", "triton", *SERVER_ONLY} - {"platformdirs"})
    modules = [module for module in MODULES if module.startswith("descant_client")]
    _python(f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import descant.cli, {', '.join(modules)}")


def test_the_server_process_works_without_torch() -> None:
    modules = [module for module in MODULES if module.startswith("descant") and not module.startswith(CHILD_ONLY)]
    server = [module for module in modules if not module.startswith("descant_kernels")]
    _python(f"import sys; sys.modules['torch'] = sys.modules['triton'] = None; import {', '.join(sorted(server))}")


def test_a_running_server_has_not_imported_torch() -> None:
    _python(
        "import sys, tempfile, anyio\n"
        "from descant.config import Config, ModelConfig, ServerConfig\n"
        "from descant.assembly.system import running\n"
        "from descant_client import connect\n"
        "async def main():\n"
        "    with tempfile.TemporaryDirectory() as data_dir:\n"
        "        model = ModelConfig(engine='dummy', dummy_tokens_per_s=0)\n"
        "        config = Config(data_dir=data_dir, server=ServerConfig(port=0), model=model)\n"
        "        async with running(config) as system, connect(f'ws://127.0.0.1:{system.port}') as client:\n"
        "            await client.generate('x', adapter='any', max_tokens=2).result()\n"
        "anyio.run(main)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )

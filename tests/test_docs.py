"""The documents are true: what they name exists, and what they show runs."""

import ast
import re
import sys
from pathlib import Path

import anyio
import pytest

from descant.assembly.system import running
from descant.config import Config, ModelConfig, ServerConfig

ROOT = Path(__file__).parent.parent
ARCHITECTURE = (ROOT / "docs/ARCHITECTURE.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
NAMED = sorted(set(re.findall(r"`((?:\w+/)*\w+\.py)::(\w+)`", ARCHITECTURE)))


def _find(path: str) -> Path:
    candidates = [ROOT / path, ROOT / "runtime/descant" / path]
    return next(candidate for candidate in candidates if candidate.exists())


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_every_name_in_the_architecture_exists(path: str, name: str) -> None:
    tree = ast.parse(_find(path).read_text("utf-8"))

    assert name in {
        node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_the_architecture_names_every_actor() -> None:
    actors = {path.name for path in (ROOT / "runtime/descant/actors").glob("*.py")} - {"__init__.py"}

    assert len(NAMED) > 20
    assert {name for name in actors if f"actors/{name}" not in ARCHITECTURE} <= {
        "auth.py",
        "fetch.py",
        "gateway.py",
        "dummy_registry.py",
    }


def test_every_file_named_in_the_documents_exists() -> None:
    for path in re.findall(r"`((?:\w+/)+\w+\.(?:py|toml|md))[`:]", ARCHITECTURE + README):
        assert [place for place in ("", "runtime/descant", "clients") if (ROOT / place / path).exists()], path


@pytest.mark.anyio
async def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    model = ModelConfig(engine="dummy", dummy_tokens_per_s=0)
    config = Config(data_dir=str(tmp_path), server=ServerConfig(port=0), model=model)

    async with running(config) as system:
        script = (
            example.replace("8080", str(system.port))
            .replace("seed=7", "seed=7, max_tokens=9")
            .replace("adapter=name)", "adapter=name, max_tokens=9)")
        )
        result = await anyio.run_process([sys.executable, "-c", script])

    assert result.stdout.decode().startswith("['pig-latin', 'reverse', 'rot13', 'upper', 'base-heads']")
    assert result.stdout.decode().count("length") == 2

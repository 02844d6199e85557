"""The order of the folders of `descant`, and what imports what: `python tests/layers.py` prints both."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "runtime" / "descant"

# Low to high. A unit imports units of lower rows only; units of one row do not import each other.
LAYERS = (
    ("__about__", "actor"),
    ("contract",),
    ("sources", "model"),
    ("config", "versions"),
    ("scheduling.placement", "scheduling.speculation", "adapters.formats"),
    ("scheduling", "engine", "adapters"),
    ("sessions",),
    ("messages",),
    ("catalog",),
    ("requests",),
    ("websocket",),
    ("actors",),
    ("assembly",),
    ("local", "cli"),
)
UNITS = [unit for row in LAYERS for unit in row]
RANK = {unit: rank for rank, row in enumerate(LAYERS) for unit in row}


def modules() -> dict[str, Path]:
    """Return every module below `descant` by its dotted name within it; the package itself is ""."""
    found: dict[str, Path] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = [part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__"]
        found[".".join(parts)] = path
    return found


def unit_of(module: str) -> str | None:
    """Return the unit of the table that a module belongs to, None if there is none."""
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if name in RANK), None)


def imported_modules(path: Path, known: dict[str, Path]) -> set[str]:
    """Return the modules of `descant` that a file imports, wherever in it the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    inside = {name.removeprefix("descant.") for name in names if name.startswith("descant.")}
    return {name for name in inside if name in known and name}


def arrows() -> dict[tuple[str, str], list[str]]:
    """Return the imports between units: (from, to) and the modules that make them, as `module -> module`."""
    known = modules()
    found: dict[tuple[str, str], list[str]] = {}
    for module, path in known.items():
        for other in sorted(imported_modules(path, known)):
            pair = (unit_of(module) or module, unit_of(other) or other)
            if module and pair[0] != pair[1]:
                found.setdefault(pair, []).append(f"{module} -> {other}")
    return found


def upward_arrows() -> list[str]:
    """Return the imports that do not go down."""
    return [
        line
        for (unit, other), lines in arrows().items()
        if RANK.get(unit, -1) <= RANK.get(other, len(LAYERS))
        for line in lines
    ]


def main() -> int:
    """Print each unit with what it imports, low to high, then what goes up. Return 1 if anything does."""
    graph = arrows()
    for row in LAYERS:
        for unit in row:
            below = [other for other in UNITS if (unit, other) in graph]
            print(f"{unit:24} {'-> ' + ', '.join(below) if below else ''}".rstrip())
    upward = upward_arrows()
    print(f"{len(UNITS)} units, {len(graph)} arrows, {len(upward)} imports that do not go down", *upward, sep="\n  ")
    return bool(upward)


if __name__ == "__main__":
    sys.exit(main())

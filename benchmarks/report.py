"""The output of every benchmark: the machine, the versions, a table, and one JSON file per run.

Numbers of different machines must not be compared, so each file describes its machine. It contains no paths.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("descant", "torch", "transformers", "peft", "triton", "msgspec", "uvloop", "websockets")
INSTRUCTION_SETS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
)
"""Those of /proc/cpuinfo that decide which products a machine is good at; on Arm their names differ."""


class Report:
    """One run of one benchmark: prints the machine it runs on, and stores the results."""

    def __init__(self, name: str, options: Namespace) -> None:
        self._name = name
        self._options = options
        self._started = dt.datetime.now(tz=dt.UTC)
        self._clock = time.perf_counter()
        self._machine = machine()

    def header(self) -> str:
        """Return two lines: the machine, and the versions."""
        machine, used = self._machine, versions()
        packages = ", ".join(f"{name} {used[name]}" for name in ("torch", "transformers", "peft") if name in used)
        return (
            f"{machine['cpu']}, {machine['cores']} cores ({' '.join(machine['instruction_sets']) or 'unknown'}), "
            f"{machine['memory_gib']} GiB, load average {machine['load_average'][0]:.1f}\n"
            f"Python {used['python']}, {packages}, commit {commit()['id'][:8] or 'unknown'}"
        )

    def save(self, results: Any, directory: Path = RESULTS) -> Path:
        """Write everything as `NAME-TIME.json` and return the path. `results` is a JSON value."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self._name}-{self._started:%Y%m%d-%H%M%S}.json"
        settings = {key: value for key, value in vars(self._options).items() if not isinstance(value, Path)}
        content = {
            "name": self._name,
            "command": _command(self._options),
            "date": self._started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self._clock, 1),
            "commit": commit(),
            "machine": self._machine | {"load_average_after": _load_average()},
            "versions": versions(),
            "settings": settings,
            "results": results,
        }
        path.write_text(json.dumps(content, indent=1, default=str) + "\n")
        return path


def machine() -> dict[str, Any]:
    """Return CPU model, cores this process may use, memory, instruction sets and the load averages now."""
    info = _cpu_info()
    flags = (info.get("flags") or info.get("Features") or "").split()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory, 1),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": _load_average(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed of `PACKAGES`."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """Return the commit that is checked out, "" if unknown, and whether tracked files differ from it."""
    return {"id": _git("rev-parse", "HEAD"), "is_modified": bool(_git("status", "--porcelain", "-uno"))}


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return lines of columns that are two blanks apart: the first flush left, the others flush right."""
    lines = [heads, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def spread(values: Sequence[float]) -> str:
    """Return the least and the largest of some values."""
    return f"{figures(min(values))}–{figures(max(values))}"


def median(values: Sequence[float]) -> float:
    """Return the median; NaN of nothing."""
    return statistics.median(values) if values else float("nan")


def figures(value: float) -> str:
    """Return a rate with three significant figures; a dash for NaN."""
    if value != value:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(value: float, base: float) -> str:
    """Return how many times `base` a value is; a dash where one of them is missing."""
    return "–" if value != value or base != base or not base else f"{value / base:.2f}×"


def paired_ratio(values: Sequence[float], bases: Sequence[float]) -> str:
    """Return the median of the ratios turn by turn, so that the noise of a turn cancels out. A dash for no turns."""
    ratios = [value / base for value, base in zip(values, bases, strict=True)] if values and bases else []
    return ratio(median(ratios), 1.0)


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Print at the end of the block the time that it took."""
    started_s = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - started_s:.0f} s", flush=True)


def _cpu_info() -> dict[str, str]:
    """Return the fields of the first core in /proc/cpuinfo; an empty mapping where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _load_average() -> list[float]:
    return [round(value, 2) for value in os.getloadavg()]


def _command(options: Namespace) -> str:
    """Return the command line with its paths left out: they have no meaning on another machine."""
    paths = {str(value) for value in vars(options).values() if isinstance(value, Path)}
    arguments = ["PATH" if argument in paths else argument for argument in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()

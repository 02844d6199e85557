"""Counts words such as who and what in docstrings: `python tests/prose.py` lists the files, the highest count first."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for package in ("runtime/descant", "kernels/descant_kernels", "clients/descant_client")
    for path in sorted((ROOT / package).rglob("*.py"))
]
RIDDLES = re.compile(r"\b(?:who|whom|whose|whoever|what|whatever)\b", re.IGNORECASE)
WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*")


class Prose(NamedTuple):
    """Numbers of words in the docstrings of a file: all words, and those of `RIDDLES`."""

    path: Path
    num_words: int
    num_riddles: int

    @property
    def rate(self) -> float:
        """Words of `RIDDLES` per 1,000 words."""
        return 1000 * self.num_riddles / max(self.num_words, 1)


def docstrings(source: str) -> Iterator[str]:
    """Yield every docstring of a module, attribute docstrings included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in node.body:
                match statement:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        yield text


def prose_of(path: Path) -> Prose:
    """Count the words of a file's docstrings."""
    text = " ".join(docstrings(path.read_text("utf-8")))
    return Prose(path, len(WORD.findall(text)), len(RIDDLES.findall(text)))


def all_prose() -> list[Prose]:
    """Return the counts of every source file, the highest count of `RIDDLES` first."""
    return sorted(map(prose_of, SOURCES), key=lambda prose: (-prose.num_riddles, str(prose.path)))


def total_rate(files: list[Prose]) -> float:
    """Return words of `RIDDLES` per 1,000 words over all files."""
    return 1000 * sum(file.num_riddles for file in files) / sum(file.num_words for file in files)


def main() -> None:
    """Print the rate of all files together, then each file with a word of `RIDDLES`."""
    files = all_prose()
    print(f"{total_rate(files):.1f} per 1,000 docstring words")
    for file in files:
        if file.num_riddles:
            print(f"{file.num_riddles:4} {file.rate:6.1f}  {file.path.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())

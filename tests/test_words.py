"""Docstrings name the thing: few of them say who or what in its place."""

from __future__ import annotations

import prose

MAX_RIDDLES_PER_1000_WORDS = 2.0


def test_docstrings_name_things_with_nouns() -> None:
    files = prose.all_prose()
    worst = files[0]

    assert prose.total_rate(files) < MAX_RIDDLES_PER_1000_WORDS, (
        f"the docstrings of {worst.path.relative_to(prose.ROOT)} say who or what {worst.num_riddles} times; "
        "`python tests/prose.py` lists all files"
    )

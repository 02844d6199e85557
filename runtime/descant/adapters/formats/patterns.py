"""Matching of regular expressions from adapter configs, which are untrusted and may be made to run forever.

Python's `re` has no time limit and cannot be interrupted. So all patterns but literals are evaluated in a child
process, which is killed when the time budget is spent.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

from descant.adapters.formats import match_child
from descant_client.errors import AdapterInvalid

MAX_PATTERN_CHARS = 4096
MAX_PATTERNS = 4096
_HARMLESS = re.compile(r"[\w.\-]*")  # without quantifier and alternative: linear time also within our expressions


class Patterns:
    """A matcher of one adapter's patterns against module names, within the limits for an adapter."""

    def __init__(self, adapter: str, names: Sequence[str], budget_s: float) -> None:
        self._adapter = adapter
        self._names = list(names)
        self._budget_s = budget_s

    def full_matches(self, pattern: str) -> set[str]:
        """Return the names that the pattern matches from beginning to end."""
        [row] = self._run([pattern], [(pattern, True)])
        return {name for name, found in zip(self._names, row, strict=True) if found is not None}

    def first_suffix_matches(self, patterns: Iterable[str]) -> dict[str, str]:
        """Return, by name, the first pattern that matches the name or its suffix after a dot (rule of PEFT)."""
        keys = list(patterns)
        rows = self._run(keys, [(rf"(.*\.)?({key})$", False) for key in keys])
        first: dict[str, str] = {}
        for key, row in zip(keys, rows, strict=True):
            for name, found in zip(self._names, row, strict=True):
                if found is not None:
                    first.setdefault(name, key)
        return first

    def layer_indices(self, patterns: Sequence[str]) -> dict[str, int]:
        """Return, by name, the layer number after the first matching pattern of `patterns` (rule of PEFT).

        Without patterns: the first number that is a whole part of the name, after at least two parts.
        """
        expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns]
        rows = self._run(patterns, [(expr, False) for expr in expressions or [r".*?\.[^.]*\.(?P<idx>\d+)\."]])
        indices: dict[str, int] = {}
        for row in rows:
            for name, found in zip(self._names, row, strict=True):
                if found:
                    indices.setdefault(name, int(found))
        return indices

    def _run(self, patterns: Sequence[str], queries: list[tuple[str, bool]]) -> list[list[str | None]]:
        if len(patterns) > MAX_PATTERNS or any(len(pattern) > MAX_PATTERN_CHARS for pattern in patterns):
            raise AdapterInvalid(
                self._adapter, f"more than {MAX_PATTERNS} patterns, or one of over {MAX_PATTERN_CHARS} characters"
            )
        if all(_HARMLESS.fullmatch(pattern) for pattern in patterns):
            return match_child.evaluate(queries, self._names)
        return self._run_in_child(queries)

    def _run_in_child(self, queries: list[tuple[str, bool]]) -> list[list[str | None]]:
        request = {"queries": queries, "names": self._names, "budget_s": self._budget_s}
        try:
            child = subprocess.run(
                [sys.executable, "-I", "-S", match_child.__file__],
                input=json.dumps(request).encode(),
                capture_output=True,
                timeout=self._budget_s,
                check=True,
            )
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as exc:
            reason = f"its patterns take longer than {self._budget_s} s to match; write them without nested repeats"
            raise AdapterInvalid(self._adapter, reason) from exc
        answer = json.loads(child.stdout)
        if "error" in answer:
            raise AdapterInvalid(self._adapter, f"a pattern in adapter_config.json is no expression: {answer['error']}")
        return answer["results"]

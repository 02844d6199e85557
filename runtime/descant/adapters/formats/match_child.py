"""Evaluates regular expressions that may take forever. Standard library only: it also runs as a script, alone.

As a script it reads one JSON request from standard input, `{"queries", "names", "budget_s"}`, and writes the result.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys


def evaluate(queries: list[tuple[str, bool]], names: list[str]) -> list[list[str | None]]:
    """Match every name against every query, which is a regular expression and whether it must match all of the name.

    Returns, per query and name, None for no match, else what the group called `idx` holds ("" without one).
    Raises re.error, OverflowError or RecursionError for an expression Python does not take.
    """
    results: list[list[str | None]] = []
    for expression, is_full in queries:
        compiled = re.compile(expression)
        match = compiled.fullmatch if is_full else compiled.match
        found = [match(name) for name in names]
        results.append([None if one is None else one.groupdict().get("idx") or "" for one in found])
    return results


def main() -> None:
    """Answer one request; ends itself when it uses more processor time than its budget."""
    request = json.load(sys.stdin)
    with contextlib.suppress(ImportError):  # no such limits on this system: the parent's timeout remains
        import resource

        seconds = int(request["budget_s"]) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    try:
        answer = {"results": evaluate(request["queries"], request["names"])}
    except (re.error, OverflowError, RecursionError) as exc:
        answer = {"error": str(exc)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()

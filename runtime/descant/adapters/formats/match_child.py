"""Evaluation of regular expressions that may take forever. Uses the standard library only, because it runs as a script.

The script reads one JSON request from standard input, `{"queries", "names", "budget_s"}`, and writes the result.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys


def evaluate(queries: list[tuple[str, bool]], names: list[str]) -> list[list[str | None]]:
    """Match every name against every query: a regular expression, and whether it must match the whole name.

    Returns, per query and name, None for no match, else the content of the group `idx` ("" without one).
    Raises re.error, OverflowError or RecursionError for an expression that Python does not accept.
    """
    results: list[list[str | None]] = []
    for expression, is_full in queries:
        compiled = re.compile(expression)
        match = compiled.fullmatch if is_full else compiled.match
        found = [match(name) for name in names]
        results.append([None if one is None else one.groupdict().get("idx") or "" for one in found])
    return results


def main() -> None:
    """Answer one request. The process is killed when it uses more processor time than its budget."""
    request = json.load(sys.stdin)
    with contextlib.suppress(ImportError):  # some systems have no such limits; the parent's timeout remains
        import resource

        limit_s = int(request["budget_s"]) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s))
    try:
        answer = {"results": evaluate(request["queries"], request["names"])}
    except (re.error, OverflowError, RecursionError) as exc:
        answer = {"error": str(exc)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()

"""Checks of combinations of adapters, and the translation of LoRAX's `merged_adapters` into one.

These are the rules that the wire types cannot express. Rules about the members' ranks are checked by the worker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypeVar

from descant_client.errors import InvalidRequest
from descant_client.lifecycle import Combination
from descant_client.protocol import MergedAdapters
from descant_client.wire import WeightedAdapter

Value = TypeVar("Value")

MIN_CLAMP = 0.5  # the median; below it the quantile is negative and the bounds of the clamp are swapped

_EXACT = ("cat", "linear", "svd")
_STRATEGIES: Final[Mapping[str, Literal["linear", "ties", "dare_linear", "dare_ties"]]] = {
    "linear": "linear",
    "ties": "ties",
    "dare_linear": "dare_linear",
    "dare_ties": "dare_ties",
}
_METHODS: Final[Mapping[str, Literal["total", "frequency"]]] = {"total": "total", "frequency": "frequency"}


def check_combination(combination: Combination, members: Sequence[WeightedAdapter]) -> None:
    """Check that a type has the fields it needs and none that it would ignore, and that weights are finite.

    Raises:
        InvalidRequest: naming the field.
    """
    kind = combination.type
    if not all(math.isfinite(member.weight) for member in members):
        raise InvalidRequest("adapters", "every weight must be finite.")
    if not kind.endswith("svd"):
        if combination.rank is not None:
            raise _unused("rank", kind, "svd and those that end in _svd")
        if combination.clamp is not None:
            raise _unused("clamp", kind, "svd and those that end in _svd")
    if combination.clamp is not None and not combination.clamp > MIN_CLAMP:
        raise InvalidRequest("combination.clamp", f"a quantile above {MIN_CLAMP}, the median, and at most 1.")
    if kind in _EXACT and combination.density is not None:
        raise _unused("density", kind, "ties, dare and magnitude_prune")
    if kind not in _EXACT and combination.density is None:
        raise InvalidRequest(
            "combination.density", f"{kind} needs it: the share of values to keep, above 0, at most 1."
        )
    if "ties" not in kind and combination.majority_sign_method != "total":
        raise _unused("majority_sign_method", kind, "ties and dare_ties")
    if "dare" not in kind and combination.seed != 0:
        raise _unused("seed", kind, "dare")


def from_lorax(merged: MergedAdapters) -> tuple[tuple[WeightedAdapter, ...], Combination]:
    """Return the members and the combination that LoRAX's `merged_adapters` asks for.

    LoRAX's clients always send `density` and `majority_sign_method`, so strategies that do not use them ignore them. A
    method that does not exist is refused with any strategy. A density of 1 or more keeps everything.

    Raises:
        InvalidRequest: naming the field.
    """
    weights = merged.weights or [1.0] * len(merged.ids)
    if len(weights) != len(merged.ids):
        reason = f"{len(weights)} weights for {len(merged.ids)} ids; give one for each, or none."
        raise InvalidRequest("merged_adapters.weights", reason)
    kind = _choice("merge_strategy", merged.merge_strategy, "linear", _STRATEGIES)
    method = _choice("majority_sign_method", merged.majority_sign_method, "total", _METHODS)
    members = tuple(WeightedAdapter(name, weight) for name, weight in zip(merged.ids, weights, strict=True))
    if kind == "linear":
        return members, Combination(type=kind)
    if not merged.density > 0:
        reason = f"{kind} needs the share of values to keep, above 0; {merged.density}, or leaving it out, keeps none."
        raise InvalidRequest("merged_adapters.density", reason)
    density = min(merged.density, 1.0)
    if "ties" not in kind:
        return members, Combination(type=kind, density=density)
    return members, Combination(type=kind, density=density, majority_sign_method=method)


def _unused(field: str, kind: str, kinds: str) -> InvalidRequest:
    """Return the error for a field that a type does not use."""
    return InvalidRequest(f"combination.{field}", f"{kind} does not use it; it is for {kinds}.")


def _choice(field: str, given: str | None, default: str, choices: Mapping[str, Value]) -> Value:
    choice = choices.get(default if given is None else given.lower())
    if choice is None:
        raise InvalidRequest(f"merged_adapters.{field}", f"{given!r} is none of {', '.join(choices)}.")
    return choice

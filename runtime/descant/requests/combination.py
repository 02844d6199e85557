"""What is asked for when adapters are combined: LoRAX's way of saying it, and what the types on the wire cannot check.

The server checks a combination before the worker hears of it. What takes the members' ranks is checked there.
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

MIN_CLAMP = 0.5  # the median: below it the quantile is negative, and both bounds of the clamp change places

_EXACT = ("cat", "linear", "svd")
_STRATEGIES: Final[Mapping[str, Literal["linear", "ties", "dare_linear", "dare_ties"]]] = {
    "linear": "linear",
    "ties": "ties",
    "dare_linear": "dare_linear",
    "dare_ties": "dare_ties",
}
_METHODS: Final[Mapping[str, Literal["total", "frequency"]]] = {"total": "total", "frequency": "frequency"}


def check(combination: Combination, members: Sequence[WeightedAdapter]) -> None:
    """Check that a type has what it needs and nothing it would ignore, and that weights are numbers.

    Raises:
        InvalidRequest: naming the field.
    """
    kind = combination.type
    if not all(math.isfinite(member.weight) for member in members):
        raise InvalidRequest("adapters", "every weight must be finite.")
    if not kind.endswith("svd"):
        _refuse("rank", combination.rank is not None, kind, "svd and those that end in _svd")
        _refuse("clamp", combination.clamp is not None, kind, "svd and those that end in _svd")
    if combination.clamp is not None and not combination.clamp > MIN_CLAMP:
        raise InvalidRequest("combination.clamp", f"a quantile above {MIN_CLAMP}, the median, and at most 1.")
    if kind in _EXACT:
        _refuse("density", combination.density is not None, kind, "ties, dare and magnitude_prune")
    elif combination.density is None:
        raise InvalidRequest(
            "combination.density", f"{kind} needs it: the share of values to keep, above 0, at most 1."
        )
    if "ties" not in kind:
        _refuse("majority_sign_method", combination.majority_sign_method != "total", kind, "ties and dare_ties")
    if "dare" not in kind:
        _refuse("seed", combination.seed != 0, kind, "dare")


def from_lorax(merged: MergedAdapters) -> tuple[tuple[WeightedAdapter, ...], Combination]:
    """Return the members and the combination that LoRAX's `merged_adapters` asks for.

    LoRAX's clients send `density` and `majority_sign_method` always, so a strategy without a use for them ignores them;
    but a method that does not exist is refused with any strategy. A density of 1 or more keeps everything.

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


def _refuse(field: str, is_given: bool, kind: str, kinds: str) -> None:
    if is_given:
        raise InvalidRequest(f"combination.{field}", f"{kind} does not use it; it is for {kinds}.")


def _choice(field: str, given: str | None, default: str, choices: Mapping[str, Value]) -> Value:
    choice = choices.get(default if given is None else given.lower())
    if choice is None:
        raise InvalidRequest(f"merged_adapters.{field}", f"{given!r} is none of {', '.join(choices)}.")
    return choice

"""Members of combinations made by PEFT, PEFT's own combinations of them, and simple, slow ones in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from descant.versions.low_rank import Factors, LowRankAdapter
from descant_client.lifecycle import Combination

MODULES = {"k": (7, 5), "q": (6, 9), "v": (11, 4)}  # (in, out), in the order in which PEFT visits them
PREFIX = "base_model.model."
Array = NDArray[np.float64]
Members = list[tuple[LowRankAdapter, float]]


@dataclass(frozen=True)
class MemberSpec:
    """One member: a LoRA of `rank` on the modules, with another rank in `v` if there is a pattern."""

    weight: float
    rank: int = 3
    alpha: float = 4.0
    is_rslora: bool = False
    modules: tuple[str, ...] = tuple(MODULES)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    seed: int = 0


weights = st.floats(-3, 3, width=32).filter(lambda weight: weight == 0 or abs(weight) > 1e-3)
densities = st.sampled_from([0.05, 0.3, 0.5, 0.77, 0.95])


@st.composite
def specs(draw: st.DrawFn, is_mixed: bool, min_size: int = 2) -> list[MemberSpec]:
    """Return a few members, all of one rank unless `is_mixed`. The first is no rsLoRA: PEFT's result would be wrong."""
    rank, pattern = draw(st.integers(1, 4)), draw(st.sampled_from([{}, {"v": 1}]))
    return [
        MemberSpec(
            weight=draw(weights),
            rank=draw(st.integers(1, 4)) if is_mixed else rank,
            alpha=draw(st.sampled_from([0.5, 3.0, 16.0])),
            is_rslora=index > 0 and draw(st.booleans()),
            modules=("q", *draw(st.sampled_from([(), ("k",), ("v",), ("k", "v")]))),
            rank_pattern=draw(st.sampled_from([{}, {"v": 1}])) if is_mixed else pattern,
            seed=draw(st.integers(0, 1000)),
        )
        for index in range(draw(st.integers(min_size, 4)))
    ]


def peft_model(members: list[MemberSpec]) -> Any:
    """Return a model of three linear layers, with the members as PEFT adapters "0", "1", ..."""
    base = nn.ModuleDict({name: nn.Linear(*sizes, bias=False) for name, sizes in MODULES.items()})
    configs = [
        LoraConfig(
            r=member.rank,
            lora_alpha=member.alpha,  # pyright: ignore[reportArgumentType] - PEFT takes fractions too
            use_rslora=member.is_rslora,
            target_modules=list(member.modules),
            rank_pattern=member.rank_pattern if "v" in member.modules else {},
        )
        for member in members
    ]
    model = get_peft_model(base, configs[0], adapter_name="0")  # pyright: ignore[reportArgumentType]
    for index, config in enumerate(configs[1:], start=1):
        model.add_adapter(str(index), config)
    with torch.no_grad():
        for index, member in enumerate(members):
            torch.default_generator.manual_seed(member.seed)
            for name, parameter in model.named_parameters():
                if f".{index}." in name:
                    parameter.normal_()
    return model


def adapter_of(model: Any, name: str) -> LowRankAdapter:
    """Return one of the model's PEFT adapters in Descant's form."""
    layers: list[tuple[str, Any]] = [
        (path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer)
    ]
    return LowRankAdapter(
        {
            path.removeprefix(PREFIX): Factors(
                layer.lora_A[name].weight.detach().clone(),
                layer.lora_B[name].weight.detach().clone(),
                layer.scaling[name],
            )
            for path, layer in layers
            if name in layer.lora_A
        }
    )


def members_of(model: Any, members: list[MemberSpec]) -> Members:
    """Return the model's adapters in Descant's form, with their weights."""
    return [(adapter_of(model, str(index)), member.weight) for index, member in enumerate(members)]


def peft_combination(model: Any, members: list[MemberSpec], how: Combination) -> LowRankAdapter:
    """Return the result of PEFT's `add_weighted_adapter` for the model's adapters."""
    options: dict[str, Any] = {"svd_rank": how.rank, "svd_clamp": how.clamp, "density": how.density}
    names = [str(index) for index in range(len(members))]
    model.add_weighted_adapter(
        names,
        [member.weight for member in members],
        "combined",
        combination_type=how.type,
        majority_sign_method=how.majority_sign_method,
        **options,
    )
    return adapter_of(model, "combined")


def updates(adapter: LowRankAdapter) -> dict[str, Tensor]:
    """Return the dense update of every module, [out, in] float64."""
    return {name: pair.scaling * (pair.b.double() @ pair.a.double()) for name, pair in adapter.factors.items()}


def distance(adapter: LowRankAdapter, judge: dict[str, Tensor]) -> float:
    """Return the largest error of a module's update, relative to the norm of the judge's. Modules must be the same."""
    mine = updates(adapter)
    assert mine.keys() == judge.keys()
    return max(float((mine[name] - judge[name]).norm() / max(judge[name].norm().item(), 1e-9)) for name in judge)


# ---- the slow way: float64, one element at a time -----------------------------------------------------------------

Thin = Callable[[Array, str], Array]


def keep_all(values: Array, key: str) -> Array:
    """Return all values unchanged."""
    return values


def slow_prune(density: float) -> Thin:
    """Keep the largest values, the earlier one of equals."""

    def thin(values: Array, key: str) -> Array:
        flat = values.flatten()
        order = sorted(range(flat.size), key=lambda index: (-abs(flat[index]), index))
        kept = set(order[: int(density * flat.size)])
        return np.array([flat[i] if i in kept else 0.0 for i in range(flat.size)]).reshape(values.shape)

    return thin


def slow_add(tensors: list[Array], factors: list[float], method: str) -> Array:
    """Return the weighted sum."""
    return np.sum([factor * tensor for factor, tensor in zip(factors, tensors, strict=True)], axis=0)


def slow_elect(tensors: list[Array], factors: list[float], method: str) -> Array:
    """Return the weighted mean of the values with the majority's sign."""
    result = np.zeros_like(tensors[0])
    for index in np.ndindex(result.shape):
        values = [float(tensor[index]) for tensor in tensors]
        votes = sum(values) if method == "total" else sum(np.sign(value) for value in values)
        sign = 1 if votes >= 0 else -1
        agreeing = [factor * value for factor, value in zip(factors, values, strict=True) if np.sign(value) == sign]
        result[index] = sum(agreeing) / max(len(agreeing), 1)
    return result


def slow_combination(members: Members, how: Combination, thin: Thin) -> dict[str, Tensor]:
    """Return the dense update of every module for any type but `cat` and `svd`, before the rank is reduced."""
    join = slow_elect if "ties" in how.type else slow_add
    result: dict[str, Tensor] = {}
    for module in sorted({name for member, _ in members for name in member.factors}):
        dense: list[Array] = []
        for view in ("update",) if how.type.endswith("_svd") else ("B", "A"):
            tensors: list[Array] = []
            factors: list[float] = []
            for index, (member, weight) in enumerate(members):
                if module not in member.factors:
                    continue
                pair = member.factors[module]
                a, b = pair.a.double().numpy(), pair.b.double().numpy()
                whole = {"A": a, "B": b, "update": pair.scaling * (b @ a)}[view]
                root = math.sqrt(abs(weight * pair.scaling))
                sided = {"A": -root if weight * pair.scaling < 0 else root, "B": root, "update": weight}[view]
                tensors.append(thin(whole, f"{index}/{module}/{view}"))
                factors.append(sided)
            dense.append(join(tensors, factors, how.majority_sign_method))
        result[module] = torch.from_numpy(dense[0] @ dense[1] if len(dense) == 2 else dense[0])
    return result


def best_of_rank(judge: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return the nearest update of a rank, by a dense decomposition in float64."""
    best: dict[str, Tensor] = {}
    for name, update in judge.items():
        u, s, vh = np.linalg.svd(update.numpy(), full_matrices=False)
        best[name] = torch.from_numpy((u[:, :rank] * s[:rank]) @ vh[:rank])
    return best

"""New adapters, which change nothing until they are trained elsewhere: A random as in PEFT, B zero."""

import math
from collections.abc import Sequence

import torch

from descant.adapters.formats.peft_config import PeftConfig, TargetModule, select_targets
from descant.contract.child_config import AdapterLimits
from descant.model.base_model import BaseModel
from descant.versions.low_rank import Factors, LowRankAdapter, float32
from descant_client.errors import AdapterInvalid

_ALL_LINEAR = "all-linear"
_SEED = 0


def choose_targets(
    adapter: str,
    base: BaseModel,
    rank: int,
    alpha: float | None,
    target_modules: Sequence[str] | None,
    limits: AdapterLimits,
) -> list[TargetModule]:
    """Return the modules of a new adapter, with rank and scaling. Allocates no tensor.

    Args:
      alpha: None: the rank, for a scaling of 1.
      target_modules: module names, or their suffixes after a dot. None: `q_proj` and `v_proj`. `all-linear` as the only
        entry: every linear but the head.

    Raises:
        AdapterInvalid: an entry matches no linear of the base, or rank or alpha are out of range.
        AdapterUnsupported: an entry matches the input embedding.
    """
    if alpha is not None and not math.isfinite(float32(alpha)):
        raise AdapterInvalid(adapter, f"alpha {alpha} is not finite")
    is_all = target_modules is not None and [entry.lower() for entry in target_modules] == [_ALL_LINEAR]
    if target_modules is not None and not is_all:
        _check_entries(adapter, base, target_modules)
    config = PeftConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        target_modules=_ALL_LINEAR if is_all else target_modules if target_modules is None else list(target_modules),
    )
    return select_targets(adapter, config, base.modules, limits)


def create(targets: Sequence[TargetModule]) -> LowRankAdapter:
    """Return the new adapter. A is Kaiming-uniform from a fixed seed, so that equal requests yield one version."""
    generator = torch.Generator().manual_seed(_SEED)
    factors: dict[str, Factors] = {}
    for target in targets:
        a = torch.empty(target.rank, target.module.in_features)
        torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        b = torch.zeros(target.module.out_features, target.rank)
        factors[target.module.name] = Factors(a, b, float32(target.scaling))
    return LowRankAdapter(factors)


def _check_entries(adapter: str, base: BaseModel, entries: Sequence[str]) -> None:
    names = ["model.embed_tokens", *(module.name for module in base.modules)]
    for entry in entries:
        if not any(name == entry or name.endswith(f".{entry}") for name in names):
            raise AdapterInvalid(adapter, f"target_modules entry {entry!r} matches no linear of this base model")

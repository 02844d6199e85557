"""The engine interface: options, info, the `StepEngine` protocol and the check of plans. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from descant.contract.plan import (
    Admit,
    EngineLimits,
    Row,
    StepPlan,
    StepResult,
    num_drafted,
    num_packed,
    validate_plan,
)
from descant_client.errors import InvalidRequest

Dtype = Literal["float32", "bfloat16", "float16"]
EngineKind = Literal["model", "dummy"]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Sizes and placement of an engine.

    `dtype` None means the checkpoint's own. The cache has `num_blocks` blocks if that is given, else as many as fit in
    `num_kv_bytes`. If the sizes of cache and arena are None, they share the rest of `memory_fraction` of a GPU's memory
    after the weights and the largest step; elsewhere they take 256 MiB each. `num_threads` is that of the whole
    process; None means one for small models and torch's choice for others. `is_invariant` is the result of an earlier
    engine's probe on this machine; None runs the probe, which takes a fraction of a second. `max_steps_in_flight` None
    means 1 on a CPU, which has no idle time to fill, and 2 on a GPU.
    """

    dtype: Dtype | None = None
    device: str = "cpu"
    num_kv_bytes: int | None = None
    num_blocks: int | None = None
    block_size: int = 16
    num_adapter_slots: int = 64
    num_adapter_bytes: int | None = None
    memory_fraction: float = 0.9
    num_host_bytes: int = 512 * 1024 * 1024  # of adapters kept in host memory
    max_num_batched_tokens: int = 1024  # new tokens of all rows of a step
    num_threads: int | None = None
    is_invariant: bool | None = None
    max_steps_in_flight: int | None = None

    @property
    def pipeline_depth(self) -> int:
        """Number of steps that may be launched before the first of them is collected."""
        return self.max_steps_in_flight or (1 if self.device == "cpu" else 2)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Properties of a loaded engine."""

    dtype: Dtype
    device: str
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    num_adapter_bytes: int
    is_invariant: bool  # the probe ran and found rows bitwise independent of the other rows of their batch
    num_threads: int = 1  # of the process, which the result of the probe is about


class StagedAdapter(Protocol):
    """A version in host memory, in a layout that only the engine knows."""

    @property
    def num_bytes(self) -> int:
        """Size in host memory."""
        ...


class StepEngine(Protocol):
    """The interface of the model's engine and of the dummy.

    Steps are launched and collected in the same order, at most `limits.max_steps_in_flight` of them at once. A step
    works on the rows, the cache and the adapters as the steps launched before it, and the placements and moves since,
    will leave them. If a row failed in one of those steps, that row is lost, not the step. All calls come from one
    thread, except `stage_adapter` and `block_until_done`.
    """

    @property
    def limits(self) -> EngineLimits:
        """The limits that plans must keep to."""
        ...

    @property
    def info(self) -> EngineInfo:
        """Properties of the engine, reported to clients."""
        ...

    def stage_adapter(self, path: Path | str) -> StagedAdapter:
        """Read, verify and lay out the version stored at `path` on the host. Any thread may call it at any time.

        Raises:
            AdapterInvalid: the file is missing, damaged or made for another base.
        """
        ...

    def place_adapter(self, adapter_slot: int, offset: int, staged: Any) -> None:
        """Copy a result of this engine's `stage_adapter` into the arena at `offset` bytes, and put it into a slot."""
        ...

    def move_adapter(self, adapter_slot: int, offset: int) -> None:
        """Move the adapter in a slot to `offset` bytes of the arena. The two extents may overlap."""
        ...

    def launch(self, plan: StepPlan) -> None:
        """Start a step. Returns at once if the device works asynchronously.

        Raises:
            InvalidRequest, UnsupportedRequest: as `check_plan`; nothing of the plan was carried out.
        """
        ...

    def block_until_done(self) -> None:
        """Wait until the oldest launched step is done. Another thread may call it while this one launches."""
        ...

    def collect(self) -> StepResult:
        """Return the result of the oldest launched step once it is done."""
        ...

    def step(self, plan: StepPlan) -> StepResult:
        """Carry out a plan: `launch` and `collect` in one. No step may be in flight."""
        ...


class RowCounts(Protocol):
    """The sizes of a row as the steps launched so far will leave it."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens, including those still being sampled."""
        ...

    @property
    def num_computed(self) -> int:
        """Number of positions whose K/V is, or will be, valid."""
        ...

    @property
    def num_blocks(self) -> int:
        """Length of the block table."""
        ...


def check_plan(
    plan: StepPlan, limits: EngineLimits, rows: Mapping[int, RowCounts], max_num_batched_tokens: int
) -> None:
    """Check a plan against the limits and the state of the rows, before any of it is carried out.

    Raises:
        InvalidRequest: the plan contradicts itself, the limits or the rows; the field names the row.
        UnsupportedRequest: it uses a feature that engines do not have yet.
    """
    validate_plan(plan, limits, tuple(rows))
    num_new_tokens = sum(row.num_new_tokens + num_drafted(row) for row in plan.rows)
    if num_new_tokens > max_num_batched_tokens:
        raise InvalidRequest("rows", f"{num_new_tokens} new tokens exceed the engine's {max_num_batched_tokens}")
    admitted = {admit.row: admit for admit in plan.admit}
    for row in plan.rows:
        _check_row(row, admitted.get(row.row), rows, limits)


def _check_row(row: Row, admit: Admit | None, rows: Mapping[int, RowCounts], limits: EngineLimits) -> None:
    if admit is not None:
        num_computed, num_tokens = admit.num_cached_tokens, num_packed(admit.token_ids)
        num_blocks = num_packed(admit.blocks)
    else:
        state = rows[row.row]
        num_computed, num_tokens, num_blocks = state.num_computed, state.num_tokens, state.num_blocks
    drafted = num_drafted(row)
    end = num_computed + row.num_new_tokens
    num_slots = (num_blocks + num_packed(row.blocks)) * limits.block_size
    if drafted and (row.num_new_tokens != 1 or end != num_tokens):
        raise InvalidRequest(f"rows[{row.row}].draft", "it follows the row's last token, computed alone")
    for last, limit, unit in (
        (end, num_tokens, "known tokens"),
        (end + drafted, num_slots, "positions of its blocks"),
        (end + drafted, limits.max_context, "positions of the context"),
    ):
        if last > limit:
            raise InvalidRequest(f"rows[{row.row}]", f"position {last - 1} is beyond the {limit} {unit}")

"""Decode steps that exist only on paper: what drafts they verified, and what came of them."""

from __future__ import annotations

from descant.contract.plan import Row, RowResult, StepPlan, StepResult, TokenDraft, pack_ints
from descant.scheduling.speculation.draft_choice import DraftChoice
from descant.scheduling.speculation.guess import Guess
from descant.scheduling.speculation.ngram import DraftTree


def plan(num_rows: int, nodes: int = 0, with_heads: int = 0) -> StepPlan:
    """A decode step whose first row has a draft."""
    draft = TokenDraft(pack_ints([1] * nodes), pack_ints(range(-1, nodes - 1)))
    return StepPlan(
        0,
        0,
        rows=tuple(
            Row(i, 1, draft=draft if nodes and not i else None, heads_slot=0, num_candidates=int(i < with_heads))
            for i in range(num_rows)
        ),
    )


def learn(
    choice: DraftChoice, plan: StepPlan, seconds: float, *, num_accepted: int = 0, is_forced: bool = False
) -> None:
    """Tell a choice of a step whose first row went so far along its draft."""
    rows = (RowResult(row.row, 1, pack_ints([0] * (1 + num_accepted * (i == 0)))) for i, row in enumerate(plan.rows))
    choice.learn(plan, StepResult(0, 0, tuple(rows)), seconds, is_forced=is_forced)


def chain(*likelihoods: float) -> Guess:
    depth = len(likelihoods)
    return Guess(DraftTree(tuple(range(depth)), tuple(range(-1, depth - 1))), likelihoods)

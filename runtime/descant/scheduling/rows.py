"""`StepBuilder`: collects the rows of a `StepPlan`."""

from __future__ import annotations

from typing import NamedTuple

from descant.contract.plan import NO_ADAPTER, NO_LOGPROBS, Admit, Row, StepPlan, TokenDraft, num_drafted, pack_ints
from descant.scheduling.sequence import Sequence
from descant.scheduling.speculation.ngram import DraftTree


class PlannedStep(NamedTuple):
    """A plan, the sequences of its rows in the same order, and when planning began, on the policy's clock."""

    plan: StepPlan
    sequences: tuple[Sequence, ...]
    begun_s: float = 0.0


class StepBuilder:
    """Collects the rows of one step within a budget of tokens."""

    def __init__(self, max_num_batched_tokens: int) -> None:
        self.num_tokens_left = max_num_batched_tokens
        self._admits: list[Admit] = []
        self._rows: list[Row] = []
        self._sequences: list[Sequence] = []
        self._prompts: set[int] = set()  # ids of sequences with a prefill

    def __len__(self) -> int:
        return len(self._rows)

    def decode(
        self,
        sequence: Sequence,
        new_blocks: list[int] | None = None,
        tree: DraftTree | None = None,
        num_candidates: int = 0,
    ) -> None:
        """Add a row that computes the sequence's last token and the nodes of a draft behind it.

        Args:
          num_candidates: number of tokens that each draft head of the sequence proposes.
        """
        device = sequence.device
        assert device.spans is not None, "a running sequence has its adapter"
        if new_blocks is None and tree is None and not num_candidates:
            if device.decode_row is None:
                device.decode_row = Row(sequence.id, 1, device.spans)
            row = device.decode_row
        else:
            draft = None if tree is None else TokenDraft(pack_ints(tree.token_ids), pack_ints(tree.parents))
            slot = device.heads_slot if num_candidates else NO_ADAPTER
            blocks = pack_ints(new_blocks or ())
            row = Row(sequence.id, 1, device.spans, blocks, draft=draft, heads_slot=slot, num_candidates=num_candidates)
        self._rows.append(row)
        self._sequences.append(sequence)
        self.num_tokens_left -= 1 + num_drafted(row)

    def has_prompt_of(self, sequence: Sequence) -> bool:
        """Return whether `prefill` or `admit` was called with the sequence."""
        return sequence.id in self._prompts

    def prefill(self, sequence: Sequence) -> int:
        """Add a row for as many uncomputed tokens as the budget allows, at least one; return their number."""
        device = sequence.device
        assert device.spans is not None, "a running sequence has its adapter"
        num_new_tokens = min(sequence.num_tokens - device.num_planned, self.num_tokens_left)
        assert num_new_tokens > 0, "a prefill without tokens"
        num_prompt_logprobs = sequence.request.num_prompt_logprobs if sequence.needs_prompt_logprobs else NO_LOGPROBS
        row = Row(sequence.id, num_new_tokens, device.spans, num_prompt_logprobs=num_prompt_logprobs)
        self._rows.append(row)
        self._sequences.append(sequence)
        self._prompts.add(sequence.id)
        self.num_tokens_left -= num_new_tokens
        return num_new_tokens

    def admit(self, sequence: Sequence) -> int:
        """Add the sequence, with all its blocks, to the engine's rows, and prefill it as `prefill` does."""
        request, device = sequence.request, sequence.device
        self._admits.append(
            Admit(
                row=sequence.id,
                token_ids=pack_ints(request.prompt_ids) + pack_ints(sequence.output.token_ids),
                num_prompt_tokens=sequence.num_prompt_tokens,
                num_cached_tokens=device.num_computed,
                blocks=pack_ints(device.block_table),
                sampling=request.sampling,
                seed=request.seed,
                choice=request.choice,
                num_logprobs=request.num_logprobs,
            )
        )
        return self.prefill(sequence)

    def remove_stopped(self) -> None:
        """Take the rows of sequences that no longer run out of the step, and give back their tokens."""
        stopped = {sequence.id for sequence in self._sequences if sequence.status != "running"}
        if not stopped:
            return
        self.num_tokens_left += sum(row.num_new_tokens + num_drafted(row) for row in self._rows if row.row in stopped)
        self._rows = [row for row in self._rows if row.row not in stopped]
        self._sequences = [sequence for sequence in self._sequences if sequence.id not in stopped]
        self._admits = [admit for admit in self._admits if admit.row not in stopped]
        self._prompts -= stopped

    def build(self, epoch: int, step: int, drop: list[int], begun_s: float) -> PlannedStep:
        """Return the planned step."""
        plan = StepPlan(epoch, step, tuple(self._admits), tuple(self._rows), pack_ints(drop))
        return PlannedStep(plan, tuple(self._sequences), begun_s)

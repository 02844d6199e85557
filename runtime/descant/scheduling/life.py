"""`ExecutorLife`: the scheduler's state that is lost with an executor: blocks, adapter places, rows."""

from __future__ import annotations

from descant.contract.plan import EngineLimits
from descant.scheduling.blocks import BlockAllocator, hash_of
from descant.scheduling.gate import AdapterGate
from descant.scheduling.sequence import Sequence
from descant.scheduling.speculation.draft_choice import DraftChoice
from descant_client.errors import InvalidRequest

WATERMARK_SHARE = 64  # admission leaves one block per running sequence free, but at most this share of all


class ExecutorLife:
    """The scheduler's state of one executor, from its start to its death."""

    def __init__(self, epoch: int, limits: EngineLimits, adapter_bytes: int) -> None:
        self.epoch = epoch
        self.blocks = BlockAllocator(limits.num_blocks, limits.block_size)
        self.gate = AdapterGate(limits.num_adapter_slots, adapter_bytes, epoch)
        self.num_steps = 0  # completed
        self.draft_choice = DraftChoice()
        self.max_steps_in_flight = limits.max_steps_in_flight
        # A step that is planned before the previous one's tokens are known cannot have drafts after them.
        self.max_draft_nodes = limits.max_draft_nodes if limits.max_steps_in_flight == 1 else 0
        # Tokens of one sequence, prompt and output: it must be able to run alone.
        self.max_tokens = min(limits.max_context, limits.num_blocks * limits.block_size)
        self._drops: list[int] = []  # rows that the engine still has and no longer needs

    def check_fits(self, sequence: Sequence) -> None:
        """Check that the sequence can ever run here.

        Raises:
            InvalidRequest: there is no room for its prompt and one token.
            AdapterTooLarge, UnsupportedRequest: there is no room for its adapter.
        """
        if sequence.num_prompt_tokens >= self.max_tokens:
            raise InvalidRequest(
                "prompt",
                f"it has {sequence.num_prompt_tokens} tokens; this server holds {self.max_tokens - 1} at most.",
            )
        if sequence.adapter is not None and not sequence.request.is_adapter_optional:
            self.gate.check_fits(sequence.adapter)

    def token_limit(self, sequence: Sequence) -> int:
        """Return the number of tokens, prompt and output, that the sequence may have here."""
        if sequence.request.max_tokens is None:
            return self.max_tokens
        return min(self.max_tokens, sequence.num_prompt_tokens + sequence.request.max_tokens)

    def allocate(self, sequence: Sequence, num_running: int) -> bool:
        """Give the sequence blocks for all its tokens, cached ones where possible. Return False if too few are left."""
        size = self.blocks.block_size
        num_matchable = 0 if sequence.needs_prompt_logprobs else (sequence.num_tokens - 1) // size
        table = self.blocks.match(hash_of(sequence, index, size) for index in range(num_matchable))
        num_missing = self.blocks.num_blocks_for(sequence.num_tokens) - len(table)
        if self.blocks.num_available < num_missing + self.watermark(num_running):
            self.blocks.release(table)
            return False
        new = self.blocks.allocate(num_missing, after=table[-1] if table else -1)
        assert new is not None, "as many blocks were available"
        device = sequence.device
        device.num_registered = len(table)
        device.num_computed = device.num_planned = len(table) * size
        device.block_table = table + new
        return True

    def watermark(self, num_running: int) -> int:
        """Return the number of blocks that admission leaves free for the growth of running sequences."""
        return min(num_running, self.blocks.num_blocks // WATERMARK_SHARE)

    def will_share(self, sequence: Sequence, other: Sequence) -> bool:
        """Return whether `other`, with the same prompt, is computing blocks that `sequence` will find in the cache."""
        num_sharable = (sequence.num_prompt_tokens - 1) // self.blocks.block_size * self.blocks.block_size
        is_ahead = other is not sequence and other.status == "running" and other.device.num_computed < num_sharable
        return is_ahead and not sequence.needs_prompt_logprobs

    def grow(self, sequence: Sequence, num_blocks: int = 1) -> list[int] | None:
        """Give the sequence `num_blocks` more blocks and return them; None if too few are left."""
        new = self.blocks.allocate(num_blocks, after=sequence.device.block_table[-1])
        if new is not None:
            sequence.device.block_table += new
        return new

    def room_behind(self, sequence: Sequence, num_wanted: int, num_running: int) -> list[int]:
        """Give the sequence blocks for `num_wanted` tokens behind its last; return the new ones, none if few are free.

        A draft must not cause a preemption: one block stays free for each running sequence.
        """
        num_missing = self.blocks.num_blocks_for(sequence.num_tokens + num_wanted) - len(sequence.device.block_table)
        if not 0 < num_missing <= self.blocks.num_available - num_running:
            return []
        new = self.grow(sequence, num_missing)
        assert new is not None, "as many blocks were available"
        return new

    def register(self, sequence: Sequence) -> None:
        """Register the full blocks of the sequence in the prefix cache, as far as its tokens are known."""
        size, device = self.blocks.block_size, sequence.device
        num_full = min(device.num_computed, sequence.num_tokens) // size
        for index in range(device.num_registered, num_full):
            self.blocks.register(device.block_table[index], hash_of(sequence, index, size))
        device.num_registered = num_full

    def release(self, sequence: Sequence) -> None:
        """Take back the sequence's blocks, adapter place and row."""
        if sequence.device.is_row:
            self._drops.append(sequence.id)
        self.blocks.release(sequence.device.block_table)
        self.gate.leave(sequence)
        sequence.forget_device_state()

    def take_drops(self) -> list[int]:
        """Return the rows to drop since the last call."""
        drops, self._drops = self._drops, []
        return drops

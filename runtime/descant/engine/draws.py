"""Tokens drawn from logits: known at once where the host samples, pending where a GPU samples without the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from descant.engine.sampling import NOT_FINITE, SampledToken, SamplingRow, node_noise, pack_logprobs, top_logprobs
from descant.engine.uploads import Download, upload_fields
from descant_kernels import sample_nodes


class Draw(Protocol):
    """Tokens drawn from N rows of logits."""

    @property
    def is_known(self) -> bool:
        """Whether the host has the tokens without blocking."""
        ...

    @property
    def sources(self) -> Sequence[int]:
        """Source of each of the N tokens on the device (see `PendingTokens`). Meaningless if the tokens are known."""
        ...

    def block_until_known(self) -> None:
        """Block until the tokens are on the host. Any thread may call this."""
        ...

    def tokens(self) -> list[SampledToken]:
        """Return the tokens, one per row. Blocks until they are on the host."""
        ...


class KnownDraw:
    """Tokens that the host knows."""

    is_known = True

    def __init__(self, tokens: list[SampledToken]) -> None:
        self.sources = [-1] * len(tokens)
        self._tokens = tokens

    def block_until_known(self) -> None:
        """See `Draw`."""

    def tokens(self) -> list[SampledToken]:
        """See `Draw`."""
        return self._tokens


class PendingDraw:
    """Tokens that the device samples without the host, and their log-probabilities."""

    is_known = False

    def __init__(
        self, sources: Sequence[int], download: Download, num_logprobs: list[int], explained: list[int]
    ) -> None:
        """`download` holds ids `[N]`, whether logits are finite `[N]`, and `top_logprobs` of the `explained` rows."""
        self.sources = sources
        self._download = download
        self._num_logprobs = num_logprobs
        self._explained = explained

    def block_until_known(self) -> None:
        """See `Draw`."""
        self._download.block_until_copied()

    def tokens(self) -> list[SampledToken]:
        """See `Draw`."""
        token_ids, is_finite, *logprobs = self._download.block_until_copied()
        drawn = [
            SampledToken(token_id) if fine else SampledToken(-1, error=NOT_FINITE)
            for token_id, fine in zip(token_ids.tolist(), is_finite.tolist(), strict=True)
        ]
        for at, row in enumerate(self._explained):
            if drawn[row].error is None:
                chosen, top_ids, top = (tensor[at : at + 1] for tensor in logprobs)
                count = self._num_logprobs[row]
                packed = pack_logprobs(chosen, top_ids[:, :count], top[:, :count])
                drawn[row] = SampledToken(drawn[row].token_id, packed)
        return drawn


def draw_later(logits: Tensor, rows: Sequence[SamplingRow], put: Callable[[Tensor], range]) -> PendingDraw:
    """Queue the sampling of rows that do not need the host. Bitwise equal to `Sampler.sample` on a CPU.

    Args:
      logits: `[N, V]` float32, unprocessed. put: stores the drawn tokens, `[N]` int64, on the device and returns their
      sources.
    """
    explained = [i for i, row in enumerate(rows) if row.has_logprobs]
    divisors = [row.divisor for row in rows]
    own = _DrawTensors(torch.tensor(divisors), torch.tensor(explained, dtype=torch.int64))
    noise, own = upload_fields((node_noise(rows), own), logits.device)
    lowest, highest = logits.aminmax(dim=-1)  # NaN is both
    scores = logits if all(divisor == 1.0 for divisor in divisors) else logits / own.divisors.unsqueeze(1)
    token_ids = sample_nodes(scores, noise)  # valid ids even for NaN logits, because the next step reads them
    downloads = [token_ids, lowest.isfinite() & highest.isfinite()]
    if explained:
        most = max(rows[i].num_logprobs for i in explained)
        downloads += top_logprobs(logits[own.explained], token_ids[own.explained], most)
    return PendingDraw(put(token_ids), Download(downloads), [row.num_logprobs for row in rows], explained)


@dataclass(frozen=True, slots=True, eq=False)
class _DrawTensors:
    divisors: Tensor  # [N] float32
    explained: Tensor  # int64, indices of the rows with log-probabilities

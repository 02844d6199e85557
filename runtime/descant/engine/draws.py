"""Tokens drawn from logits: known at once where the host samples, on their way where a GPU samples by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from descant.engine.sampling import (
    GREEDY_BELOW,
    NOT_FINITE,
    SampledToken,
    SamplingRow,
    pack_logprobs,
    top_logprobs,
)
from descant.engine.uploads import Download, upload
from descant_client.protocol import SamplingParams
from descant_kernels import NodeNoise, sample_nodes


class Draw(Protocol):
    """Tokens drawn from N rows of logits."""

    @property
    def is_known(self) -> bool:
        """Whether the host has them without waiting."""
        ...

    @property
    def sources(self) -> Sequence[int]:
        """Where the device has each token (see `PendingTokens`); of no use if they are known. N of them."""
        ...

    def wait(self) -> None:
        """Wait until they are on the host; any thread may."""
        ...

    def tokens(self) -> list[SampledToken]:
        """Return them, one per row, once they are on the host."""
        ...


class DrawnAlready:
    """Tokens that the host knows."""

    is_known = True

    def __init__(self, tokens: list[SampledToken]) -> None:
        self.sources = [-1] * len(tokens)
        self._tokens = tokens

    def wait(self) -> None:
        """See `Draw`."""

    def tokens(self) -> list[SampledToken]:
        """See `Draw`."""
        return self._tokens


class DrawOnItsWay:
    """Tokens that the device samples by itself, and their log-probabilities."""

    is_known = False

    def __init__(
        self, sources: Sequence[int], download: Download, num_logprobs: list[int], explained: list[int]
    ) -> None:
        """`download` brings ids `[N]`, whether logits are finite `[N]`, and `top_logprobs` of the `explained` rows."""
        self.sources = sources
        self._download = download
        self._num_logprobs = num_logprobs
        self._explained = explained

    def wait(self) -> None:
        """See `Draw`."""
        self._download.wait()

    def tokens(self) -> list[SampledToken]:
        """See `Draw`."""
        token_ids, is_finite, *logprobs = self._download.wait()
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


def needs_host(params: SamplingParams) -> bool:
    """Whether sampling takes penalties, a bias or filters, which the host has a part in; temperature alone does not."""
    return bool(
        params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or params.top_k
        or params.top_p < 1.0
        or params.min_p
        or params.typical_p < 1.0
    )


def draw_later(logits: Tensor, rows: Sequence[SamplingRow], put: Callable[[Tensor], range]) -> DrawOnItsWay:
    """Queue what `Sampler.sample` does for rows that do not need the host. Bitwise the same on a CPU.

    Args:
      logits: `[N, V]` float32, as the model made them. put: keeps the tokens drawn, `[N]` int64, on the device.
    """
    is_sampled = [row.params.temperature >= GREEDY_BELOW for row in rows]
    explained = [i for i, row in enumerate(rows) if row.num_logprobs >= 0]
    temperatures = [row.params.temperature if drawn else 1.0 for row, drawn in zip(rows, is_sampled, strict=True)]
    noise = NodeNoise.of(
        [row.seed for row in rows], [row.choice for row in rows], [row.output_index for row in rows], is_sampled
    )
    seeds, choices, output_indices, sampled, scales, wanted = upload(
        [
            *(noise.seeds, noise.choices, noise.output_indices, noise.sampled),
            *(torch.tensor(temperatures), torch.tensor(explained, dtype=torch.int64)),
        ],
        logits.device,
    )
    noise = replace(noise, seeds=seeds, choices=choices, output_indices=output_indices, sampled=sampled)
    lowest, highest = logits.aminmax(dim=-1)  # NaN is both
    scores = logits if all(temperature == 1.0 for temperature in temperatures) else logits / scales.unsqueeze(1)
    token_ids = sample_nodes(scores, noise)  # in the vocabulary even where logits are NaN: the next step reads them
    downloads = [token_ids, lowest.isfinite() & highest.isfinite()]
    if explained:
        most = max(rows[i].num_logprobs for i in explained)
        downloads += top_logprobs(logits[wanted], token_ids[wanted], most)
    return DrawOnItsWay(put(token_ids), Download(downloads), [row.num_logprobs for row in rows], explained)

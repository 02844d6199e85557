"""Sampling of tokens from logits: penalties, bias, temperature, filters, noise, log-probabilities.

Every row is processed alone: on a CPU its results do not depend, by a bit, on the rest of the batch. So sums over the
vocabulary are sequential (`cumsum`) or done by softmax, which works row by row; `Tensor.sum` splits single rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from descant.contract.plan import NO_LOGPROBS, LogprobRows
from descant_client.protocol import SamplingParams
from descant_kernels import NodeNoise, sample_nodes

GREEDY_BELOW = 1e-5
"""Temperature below which a row is greedy: a logit divided by a lower one could leave the range of float32."""

_LARGEST_SCORE = 1e30
"""Bound on scores after penalties and bias, so that a score divided by GREEDY_BELOW stays in the range of float32."""

_CANDIDATES = (1024, 16_384)
"""Tokens that a filter sorts in its first and second stage. Rows that need more sort the whole vocabulary."""

_LOGPROB_CHUNK_ROWS = 64
NOT_FINITE = "the model gave logits that are not finite"


@dataclass(frozen=True, slots=True, eq=False)
class SamplingRow:
    """The sampling inputs of one row of logits, that is, of one node.

    `prompt_ids` and `output_ids` are views of the sequence's tokens so far (at a tree node, ancestors included): 1-D
    integer tensors on any device, or plain sequences. They are read only if `params` has penalties.
    """

    params: SamplingParams
    seed: int
    choice: int
    output_index: int
    prompt_ids: Tensor | Sequence[int]
    output_ids: Tensor | Sequence[int]
    num_logprobs: int = NO_LOGPROBS

    @property
    def is_greedy(self) -> bool:
        """Whether the token is the argmax: the temperature counts as 0."""
        return self.params.temperature < GREEDY_BELOW

    @property
    def divisor(self) -> float:
        """Number that divides the logits: the temperature, or 1.0 for a greedy row."""
        return 1.0 if self.is_greedy else self.params.temperature

    @property
    def has_adjustments(self) -> bool:
        """Whether penalties or a bias change the logits."""
        params = self.params
        return bool(
            params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty or params.logit_bias
        )

    @property
    def has_filters(self) -> bool:
        """Whether a filter excludes tokens."""
        params = self.params
        return bool(params.top_k or params.top_p < 1.0 or params.min_p or params.typical_p < 1.0)

    @property
    def needs_host(self) -> bool:
        """Whether sampling takes steps that involve the host. Temperature alone does not."""
        return self.has_adjustments or self.has_filters

    @property
    def has_logprobs(self) -> bool:
        """Whether the token's log-probabilities are reported."""
        return self.num_logprobs != NO_LOGPROBS


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token drawn at one row. If there is none, `token_id` is -1 and `error` holds the reason."""

    token_id: int
    logprobs: LogprobRows | None = None
    error: str | None = None


class Sampler:
    """A sampler of tokens. Holds no state of any request."""

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self._vocab_size = vocab_size
        self._device = torch.device(device)

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """Draw one token per row from its processed distribution. `logits` is overwritten.

        Log-probabilities are those of the unprocessed logits. A row with logits that are not finite gets an error; the
        other rows get their tokens.

        Args:
          logits: `[N, V]` float32, contiguous, unprocessed. rows: N.
        """
        assert logits.shape == (len(rows), self._vocab_size), "one row of logits over the vocabulary per sampling row"
        assert logits.dtype == torch.float32, "logits are float32"
        errors = _find_errors(logits, rows)
        explained = [i for i, row in enumerate(rows) if row.has_logprobs and i not in errors]
        raw = logits[explained] if explained else logits[:0]
        self._process(logits, rows, errors)
        token_ids = sample_nodes(logits, node_noise(rows, self._device)).tolist()
        logprobs = _explain(raw, [(token_ids[i], rows[i].num_logprobs) for i in explained])
        logprobs_by_row = dict(zip(explained, logprobs, strict=True))
        return [
            SampledToken(-1, None, errors[i]) if i in errors else SampledToken(token_id, logprobs_by_row.get(i))
            for i, token_id in enumerate(token_ids)
        ]

    def logprob_rows(self, logits: Tensor, token_ids: Tensor | Sequence[int], num_top: int) -> LogprobRows:
        """Return log-probabilities of `token_ids` and of the `num_top` most probable tokens of each row.

        Order: most probable first; of equals, lowest id first.

        Args:
          logits: `[N, V]` float32, unprocessed. token_ids: `[N]` integers.
        """
        chosen_ids = torch.as_tensor(token_ids, dtype=torch.int64, device=logits.device)
        chunks = zip(logits.split(_LOGPROB_CHUNK_ROWS), chosen_ids.split(_LOGPROB_CHUNK_ROWS), strict=True)
        parts = [top_logprobs(chunk, ids, num_top) for chunk, ids in chunks] or [_no_logprobs()]
        chosen, top_ids, top = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return pack_logprobs(chosen, top_ids, top)

    def _process(self, scores: Tensor, rows: Sequence[SamplingRow], errors: dict[int, str]) -> None:
        """Apply all processing before the noise, in the order of the wire contract. In place."""
        for i, row in enumerate(rows):
            if i not in errors and row.has_adjustments:
                _adjust(scores[i], row)
        divisors = [1.0 if i in errors else row.divisor for i, row in enumerate(rows)]
        if any(divisor != 1.0 for divisor in divisors):
            scores /= torch.tensor(divisors, device=scores.device).unsqueeze(1)
        params = [None if row.is_greedy or i in errors else row.params for i, row in enumerate(rows)]
        filters: tuple[tuple[Callable[[Tensor, Tensor], Tensor], list[float | int | None]], ...] = (
            (_keep_top_k, [p.top_k if p and 0 < p.top_k < self._vocab_size else None for p in params]),
            (_keep_top_p, [p.top_p if p and p.top_p < 1.0 else None for p in params]),
            (_keep_min_p, [p.min_p if p and p.min_p > 0.0 else None for p in params]),
            (_keep_typical, [p.typical_p if p and p.typical_p < 1.0 else None for p in params]),
        )
        for keep, limits in filters:
            _filter_rows(scores, keep, limits)


def node_noise(rows: Sequence[SamplingRow], device: torch.device | str = "cpu") -> NodeNoise:
    """Return the noise of rows of logits; greedy rows take none."""
    return NodeNoise.of(
        [row.seed for row in rows],
        [row.choice for row in rows],
        [row.output_index for row in rows],
        [not row.is_greedy for row in rows],
        device,
    )


def _find_errors(logits: Tensor, rows: Sequence[SamplingRow]) -> dict[int, str]:
    """Return the errors of rows that cannot be sampled.

    A row's sum is not finite if any element is not. It may also overflow, near 1e38, so such rows are checked in full.
    """
    sums = logits.sum(-1).isfinite().tolist()
    errors = {i: NOT_FINITE for i, is_finite in enumerate(sums) if not is_finite and not logits[i].isfinite().all()}
    for i, row in enumerate(rows):
        if row.params.logit_bias and max(row.params.logit_bias) >= logits.shape[1]:
            errors[i] = f"logit_bias names token {max(row.params.logit_bias)}; the vocabulary has {logits.shape[1]}"
    return errors


# ---- penalties and bias -------------------------------------------------------------------------------------------


def _adjust(scores: Tensor, row: SamplingRow) -> None:
    """Penalize tokens of prompt and output, and add the bias. `scores` is one row, `[V]`; in place.

    Repetition penalty: Keskar et al. 2019 (CTRL), as in Transformers. Presence and frequency penalty: as in OpenAI's
    API.
    """
    params, device = row.params, scores.device
    output_ids = torch.as_tensor(row.output_ids, dtype=torch.int64, device=device)
    if params.repetition_penalty != 1.0:
        prompt_ids = torch.as_tensor(row.prompt_ids, dtype=torch.int64, device=device)
        ids = torch.cat((prompt_ids, output_ids)).unique()
        seen = scores[ids]
        scores[ids] = torch.where(seen < 0, seen * params.repetition_penalty, seen / params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and len(output_ids):
        ids, counts = output_ids.unique(return_counts=True)
        scores[ids] -= counts.to(torch.float32) * params.frequency_penalty + params.presence_penalty
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=device)
        scores[ids] += torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
    scores.nan_to_num_(0.0).clamp_(-_LARGEST_SCORE, _LARGEST_SCORE)  # 0 divided by an underflowed penalty is NaN


# ---- filters: scores [n, V], limits [n] -> scores with excluded tokens at -inf --------------------------------------


def _filter_rows(
    scores: Tensor, keep: Callable[[Tensor, Tensor], Tensor], limits: Sequence[float | int | None]
) -> None:
    """Apply a filter to the rows that have a limit. In place."""
    indices = [i for i, limit in enumerate(limits) if limit is not None]
    if not indices:
        return
    values = torch.tensor([float(limits[i] or 0) for i in indices], dtype=torch.float64, device=scores.device)
    if len(indices) == len(limits):
        scores.copy_(keep(scores, values))
    else:
        rows = torch.tensor(indices, device=scores.device)
        scores.index_copy_(0, rows, keep(scores[rows], values))


def _keep_top_k(scores: Tensor, limits: Tensor) -> Tensor:
    """Keep tokens that do not score below the k-th highest score. Equals of the k-th are kept."""
    ranks = limits.to(torch.int64)
    highest = scores.topk(int(ranks.max()), dim=-1).values
    thresholds = highest.gather(1, (ranks - 1).unsqueeze(1))
    return scores.masked_fill(scores < thresholds, -torch.inf)


def _keep_top_p(scores: Tensor, limits: Tensor) -> Tensor:
    """Keep the fewest most probable tokens with a total probability of at least p (Holtzman et al. 2020)."""
    return _keep_in_stages(scores, limits, _nucleus)


def _keep_min_p(scores: Tensor, limits: Tensor) -> Tensor:
    """Keep tokens at least `min_p` times as probable as the most probable one."""
    probs = scores.softmax(-1)
    thresholds = limits.to(torch.float32).unsqueeze(1) * probs.amax(-1, keepdim=True)
    return scores.masked_fill(probs < thresholds, -torch.inf)


def _keep_typical(scores: Tensor, limits: Tensor) -> Tensor:
    """Keep the tokens with surprise nearest to the entropy, up to mass `typical_p` (Meister et al. 2023)."""
    return _keep_in_stages(scores, limits, _typical)


def _keep_in_stages(
    scores: Tensor, limits: Tensor, stage: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
) -> Tensor:
    """Run a stage over few candidates, then over more candidates for rows that need them."""
    vocab_size = scores.shape[1]
    kept, rows = scores, torch.arange(len(scores), device=scores.device)
    for num_candidates in (*(few for few in _CANDIDATES if few < vocab_size), vocab_size):
        found, is_complete = stage(scores[rows], limits[rows], num_candidates)
        kept = found if len(rows) == len(scores) else kept.index_copy_(0, rows, found)
        rows = rows[~is_complete]
        if not len(rows):
            break
    return kept


def _nucleus(scores: Tensor, limits: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    ids = _order_keys(scores).topk(num_candidates, dim=-1).indices
    probs = scores.softmax(-1).gather(1, ids).to(torch.float64)
    mass = probs.cumsum(-1)
    is_kept = mass - probs < limits.unsqueeze(1)
    kept = torch.full_like(scores, -torch.inf)
    kept.scatter_(1, ids, scores.gather(1, ids).masked_fill(~is_kept, -torch.inf))
    return kept, (mass[:, -1] >= limits) | (num_candidates == scores.shape[1])


def _typical(scores: Tensor, limits: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    logprobs, probs = scores.log_softmax(-1), scores.softmax(-1)
    distances = (-logprobs - _entropy(logprobs, probs)).abs()
    nearest, ids = distances.topk(num_candidates, dim=-1, largest=False)
    mass = probs.gather(1, ids).to(torch.float64).cumsum(-1)
    last = (mass < limits.unsqueeze(1)).sum(-1, keepdim=True).clamp_(max=num_candidates - 1)
    kept = scores.masked_fill(distances > nearest.gather(1, last), -torch.inf)
    return kept, (mass[:, -1] >= limits) | (num_candidates == scores.shape[1])


def _entropy(logprobs: Tensor, probs: Tensor) -> Tensor:
    """Return the entropy of each row, `[n, 1]`, summed in order of token id."""
    return -torch.where(probs > 0, logprobs * probs, 0.0).cumsum(-1)[:, -1:]


def _order_keys(scores: Tensor) -> Tensor:
    """Return distinct int64 keys in the order of `scores`; of equals the lowest id has the highest key."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal 0.0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    return (ordered << 32) | torch.arange(scores.shape[1] - 1, -1, -1, device=scores.device)


# ---- log-probabilities --------------------------------------------------------------------------------------------


def top_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities of `token_ids` `[N]`, ids of the most probable tokens `[N, num_top]` and theirs."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    num_top = min(num_top, logits.shape[1])
    if num_top <= 0:
        return chosen, token_ids.new_empty(len(token_ids), 0), chosen.new_empty(len(token_ids), 0)
    top_ids = _order_keys(logits).topk(num_top, dim=-1).indices
    return chosen, top_ids, logprobs.gather(1, top_ids)


def _no_logprobs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(0), torch.empty(0, 0, dtype=torch.int64), torch.empty(0, 0)


def _explain(raw: Tensor, wanted: Sequence[tuple[int, int]]) -> list[LogprobRows]:
    """Return one `LogprobRows` per row of `raw` from its (token id, number of alternatives)."""
    if not wanted:
        return []
    token_ids = torch.tensor([token_id for token_id, _ in wanted], device=raw.device)
    most = max(num_top for _, num_top in wanted)
    chosen, top_ids, top = (tensor.cpu() for tensor in top_logprobs(raw, token_ids, most))
    return [
        pack_logprobs(chosen[i : i + 1], top_ids[i : i + 1, :num_top], top[i : i + 1, :num_top])
        for i, (_, num_top) in enumerate(wanted)
    ]


def pack_logprobs(chosen: Tensor, top_ids: Tensor, top: Tensor) -> LogprobRows:
    """Pack the result of `top_logprobs`, on any device, into a message."""
    return LogprobRows(
        num_tokens=chosen.shape[0],
        num_top=top.shape[1],
        chosen=chosen.cpu().numpy().astype("<f4").tobytes(),
        top_ids=top_ids.cpu().numpy().astype("<i4").tobytes(),
        top=top.cpu().numpy().astype("<f4").tobytes(),
    )

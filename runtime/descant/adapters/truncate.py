"""The best approximation of an update at a rank: B = U S and A = V^T of its singular value decomposition.

Singular vectors are unique up to a sign, which LAPACK does not specify. Here the largest value of each row of A is
positive, so that every machine gets the same factors up to rounding.
"""

import torch
from torch import Tensor

from descant.versions.low_rank import Factors


def truncated_product(left: Tensor, right: Tensor, rank: int, clamp: float | None) -> Factors:
    """Approximate `left @ right`, `[out, K]` and `[K, in]`, without computing the product. Computed in float64.

    The result has `rank`, or the rank of the product (at least 1) if that is less; it is then exact. `clamp` as in
    `truncated_matrix`.
    """
    left_basis, left_core = torch.linalg.qr(left.double())
    right_basis, right_core = torch.linalg.qr(right.double().T)
    u, s, vh = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    # Singular values as small as the rounding of the product are noise, and so are their vectors.
    noise = torch.finfo(s.dtype).eps * (left.shape[0] + right.shape[1]) * left_core.norm() * right_core.norm()
    rank = min(rank, max(int((s > noise).sum()), 1))
    return _factors(left_basis @ u[:, :rank], s[:rank], vh[:rank] @ right_basis.T, clamp)


def truncated_matrix(matrix: Tensor, rank: int, clamp: float | None) -> Factors:
    """Approximate a matrix `[out, in]`. Computed in float32, as its inputs; float64 would take twice the memory.

    The result has `rank`, or min(out, in) if that is less. `clamp` limits the values of both factors to the quantile
    of that order of all their values, and to its negative.
    """
    u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    return _factors(u[:, :rank], s[:rank], vh[:rank], clamp)


def _factors(u: Tensor, s: Tensor, vh: Tensor, clamp: float | None) -> Factors:
    largest = vh.gather(1, vh.abs().argmax(dim=1, keepdim=True))[:, 0]
    sign = torch.where(largest < 0, -1, 1)
    b, a = u * (s * sign), vh * sign[:, None]
    if clamp is not None:
        bound = _quantile(torch.cat([b.flatten(), a.flatten()]), clamp).clamp(min=0)
        b, a = b.clamp(-bound, bound), a.clamp(-bound, bound)
    return Factors(a.float().contiguous(), b.float().contiguous())


def _quantile(values: Tensor, order: float) -> Tensor:
    """Return the quantile like `torch.quantile`, which is limited to 16 million values."""
    position = order * (values.numel() - 1)
    below = int(position)
    low = values.kthvalue(below + 1).values
    high = values.kthvalue(min(below + 2, values.numel())).values
    return low + (high - low) * (position - below)

"""The Triton kernels on a GPU: time against the bytes each must move, and against the plain alternatives.

    python benchmarks/gpu.py

Without a CUDA device it measures nothing and says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from descant_kernels import LoraTables, Segments, add_lora, reference, rms_norm, write_kv

REPEATS = 30
L2_BYTES = 256 << 20  # written before each repeat, so that nothing is left in the cache
HIDDEN, RANK, HEADS, HEAD_DIM, BLOCK_SIZE = 4096, 16, 8, 128, 16


def main() -> None:
    """Print the table."""
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured")
        return
    bandwidth = measure_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e9:.0f} GB/s, bf16, median of {REPEATS}")
    print(f"{'op':<44}{'µs':>9}{'floor':>9}{'of floor':>10}{'plain':>10}")
    for num_rows in (1, 32, 256):
        for num_adapters in (1, 32):
            show(f"add_lora {num_rows} rows, {num_adapters} adapters", *lora_case(num_rows, num_adapters), bandwidth)
    for num_rows in (1, 256, 4096):
        show(f"rms_norm {num_rows} rows", *norm_case(num_rows), bandwidth)
        show(f"write_kv {num_rows} rows", *write_case(num_rows), bandwidth)


def show(label: str, op: Callable[[], None], plain: Callable[[], None], num_bytes: int, bandwidth: float) -> None:
    """Print one line."""
    seconds, plain_s, floor_s = measure(op), measure(plain), num_bytes / bandwidth
    cells = f"{seconds * 1e6:>9.1f}{floor_s * 1e6:>9.1f}{floor_s / seconds:>9.0%} {plain_s / seconds:>8.2f}×"
    print(f"{label:<44}{cells}")


def lora_case(num_rows: int, num_adapters: int) -> tuple[Callable[[], None], Callable[[], None], int]:
    """Rows dealt to adapters in runs; the plain way is a loop over adapters."""
    used = min(num_rows, num_adapters)
    size = RANK * 2 * HIDDEN
    arena = torch.randn(used * size, device="cuda", dtype=torch.bfloat16)
    tables = LoraTables.of(arena, [[slot * size] for slot in range(used)], [[RANK]] * used)
    lengths = [num_rows // used + (i < num_rows % used) for i in range(used)]
    segments = Segments.of(lengths, list(range(used)), device="cuda")
    x, y = (torch.randn(num_rows, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in "xy")
    num_bytes = 2 * used * size + 2 * x.numel() + 4 * y.numel()
    arguments = (y, x, tables, segments, 0, (HIDDEN,))
    return lambda: add_lora(*arguments), lambda: reference.add_lora(*arguments), num_bytes


def norm_case(num_rows: int) -> tuple[Callable[[], None], Callable[[], None], int]:
    """With the residual fused in."""
    x, residual = (torch.randn(num_rows, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in "xr")
    weight = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)
    plain = lambda: reference.rms_norm(x, weight, 1e-5, residual)  # noqa: E731
    return lambda: rms_norm(x, weight, 1e-5, residual), plain, 2 * 4 * x.numel()


def write_case(num_rows: int) -> tuple[Callable[[], None], Callable[[], None], int]:
    """Rows scattered over the cache."""
    num_blocks = 2 * -(-num_rows // BLOCK_SIZE)
    k, v = (torch.randn(num_rows, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    caches = [torch.zeros(num_blocks, HEADS, BLOCK_SIZE, HEAD_DIM, device="cuda", dtype=k.dtype) for _ in "kv"]
    slots = torch.randperm(num_blocks * BLOCK_SIZE, device="cuda")[:num_rows]
    return lambda: write_kv(k, v, *caches, slots), lambda: reference.write_kv(k, v, *caches, slots), 2 * 4 * k.numel()


def measure(op: Callable[[], None]) -> float:
    """Return the median seconds of an op, the second-level cache flushed before each."""
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    seconds = []
    for _ in range(REPEATS + 3):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        op()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds[3:])


def measure_bandwidth() -> float:
    """Return bytes per second of a large copy, reads and writes together."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / measure(lambda: target.copy_(source))


if __name__ == "__main__":
    main()

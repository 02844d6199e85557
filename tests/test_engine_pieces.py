"""Work beside the step loop leaves no helper threads behind, and equals torch's result in one call."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from descant.engine.uploads import HostUploader
from descant.versions import pieces

SIZE = 10 * pieces.PIECE + 7


@contextmanager
def side_thread(work: Callable[[], object]) -> Iterator[None]:
    """Do some work in a thread that lives until the block ends."""
    is_done, may_end = threading.Event(), threading.Event()

    def run() -> None:
        work()
        is_done.set()
        may_end.wait()

    thread = threading.Thread(target=run)
    thread.start()
    is_done.wait()
    yield
    may_end.set()
    thread.join()


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads of /proc")
@pytest.mark.usefixtures("two_threads")
def test_reading_an_adapter_beside_the_steps_starts_no_helpers() -> None:
    data = torch.randn(SIZE)

    def stage() -> None:
        pieces.multiply([data[: SIZE // 2], data[SIZE // 2 :]], [0.5, 2.0])
        HostUploader().stage(data, torch.bfloat16)

    before = num_threads()
    with side_thread(stage):
        assert num_threads() == before + 1
    with side_thread(lambda: data.to(torch.bfloat16)):  # the problem that pieces avoid
        assert num_threads() > before + 1


def test_pieces_give_what_torch_gives_at_once() -> None:
    data = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    first, second = data[:5].clone(), data[5:].clone()
    staged = torch.empty(SIZE, dtype=torch.bfloat16)

    pieces.copy(staged, data)
    pieces.multiply([first, second], [3.0, 0.7])

    assert torch.equal(staged, data.to(torch.bfloat16))
    assert torch.equal(first, 3.0 * data[:5])
    assert torch.equal(second, 0.7 * data[5:])


def test_what_has_the_right_dtype_already_is_not_copied() -> None:
    data = torch.randn(9)

    assert HostUploader().stage(data, torch.float32) is data

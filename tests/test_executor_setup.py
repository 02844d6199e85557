"""The configuration of later lives of the executor."""

from __future__ import annotations

from pathlib import Path

from descant.assembly.executor_setup import executor_config
from descant.config import Config
from descant.contract.engine import EngineInfo

EARLIER = EngineInfo("float32", "cpu", (), 1, 1, is_invariant=False, num_threads=3)


def test_a_first_executor_probes_and_takes_its_number_of_threads_from_the_configuration() -> None:
    options = executor_config(Config(), Path("model")).options

    assert (options.is_invariant, options.num_threads) == (None, None)


def test_later_ones_take_threads_and_the_result_of_the_probe_from_the_first() -> None:
    options = executor_config(Config(), Path("model"), EARLIER).options

    assert (options.is_invariant, options.num_threads) == (False, 3)

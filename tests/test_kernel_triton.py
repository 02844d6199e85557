"""The Triton kernels run in Triton's interpreter, in a process of their own, or on a GPU.

The interpreter must be chosen before anything imports Triton, and other tests import what imports it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOPICS = ["attention", "fused", "lora", "sample"]


def run_cases(topic: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the cases of a topic with these environment variables."""
    cases = Path(__file__).with_name(f"kernel_triton_{topic}_cases.py")
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.slow
@pytest.mark.parametrize("topic", TOPICS)
def test_triton_kernels_agree_with_the_reference_in_the_interpreter(topic):
    ran = run_cases(topic, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")

    assert ran.returncode == 0, ran.stdout[-4000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("topic", TOPICS)
def test_triton_kernels_agree_with_the_reference_on_a_gpu(topic):
    ran = run_cases(topic, DESCANT_TEST_DEVICE="cuda")

    assert ran.returncode == 0, ran.stdout[-4000:]

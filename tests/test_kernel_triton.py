"""The Triton kernels run in Triton's interpreter, in a process of their own.

The interpreter must be chosen before anything imports Triton, and other tests import what imports it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("kernel_triton_cases.py")


def run_cases(**environment: str) -> subprocess.CompletedProcess[str]:
    """Run the cases with these environment variables."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.slow
def test_triton_kernels_agree_with_the_reference():
    ran = run_cases(TRITON_INTERPRET="1")

    assert ran.returncode == 0, ran.stdout[-4000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_kernels_agree_with_the_reference_on_a_gpu():
    ran = run_cases(DESCANT_TEST_DEVICE="cuda")

    assert ran.returncode == 0, ran.stdout[-4000:]


def test_a_cpu_server_does_not_import_triton():
    code = "import sys, descant_kernels; sys.exit('triton' in sys.modules)"

    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0

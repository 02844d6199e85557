"""The Triton kernels run in Triton's interpreter, in a process of their own.

The interpreter must be chosen before anything imports Triton, and other tests import what imports it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("kernel_triton_cases.py")


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_triton_kernels_agree_with_the_reference():
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]

    ran = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)

    assert ran.returncode == 0, ran.stdout[-4000:]


def test_a_cpu_server_does_not_import_triton():
    code = "import sys, descant_kernels; sys.exit('triton' in sys.modules)"

    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0

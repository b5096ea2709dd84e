"""vLLM's kernels for a GPU, run by Triton's interpreter where Triton is installed.

What calls them is tried everywhere, with kernels written out in torch (``test_gpu_wrappers``).
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="pip install triton, 290 MB")
@pytest.mark.parametrize("what", ["shared", "experts", "dora"])
def test_the_kernels_of_a_gpu_answer_alike(what: str) -> None:
    """In a process of its own: here vLLM has decided that there is no Triton."""
    command = [sys.executable, "-m", "tests.support.interpreted", what]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr

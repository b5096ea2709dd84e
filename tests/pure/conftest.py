"""The pure layer knows no vLLM: whatever imports it, however deep, fails here at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def without_vllm() -> Iterator[None]:
    """Make ``import vllm`` an ImportError, unless another layer's test in this process has imported it."""
    if "vllm" in sys.modules:
        yield
        return
    sys.modules["vllm"] = None  # type: ignore[assignment]
    yield
    del sys.modules["vllm"]

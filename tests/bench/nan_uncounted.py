"""A server that does not count NaN, which no operator's is: ``python -m tests.bench.nan_uncounted``."""

from __future__ import annotations

from server.__main__ import _serve
from server.engine import environment
from server.settings import Settings

if __name__ == "__main__":
    del environment.REQUIRED["VLLM_COMPUTE_NANS_IN_LOGITS"]
    raise SystemExit(_serve(Settings.load(None)))

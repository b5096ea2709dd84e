"""What the tests' own processes are forked from: every test module that is to be run, and what those need."""

from __future__ import annotations

import gc
import importlib
import json
import os

import pytest

ARGUMENTS = "TESTS_TO_COLLECT"  # those of pytest, in JSON

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

# pytest rewrites the assertions of what it imports itself, so it comes first. What cannot be collected is
# told by the processes that are to run it. Nothing is captured, or loggers would keep what is closed at the
# end; in those processes the same descriptors are captured.
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
pytest.main(
    [*json.loads(os.environ[ARGUMENTS]), "--collect-only", "--quiet", "--capture=no", "-n0", "--dist=no"]
)

importlib.import_module("tests.support.imported")

gc.collect()
gc.freeze()  # or each process would look through all of it

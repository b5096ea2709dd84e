"""What the tests' fork server imports before it forks: all that a server and its engine need."""

from __future__ import annotations

import gc
import importlib

for name in ("tests.support.libraries", "tests.support.crashes", "tests.support.resting_executor"):
    importlib.import_module(name)

gc.collect()
gc.freeze()  # or each process would look through all of it

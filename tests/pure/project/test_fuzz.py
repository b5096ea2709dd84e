"""A short run of ``make fuzz``, and that the fuzzer would notice."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.errors import AdapterRejected
from tests.fuzz import Findings, config_bytes, fuzz_config, fuzz_header, weights_bytes

COUNT = 3000


@pytest.mark.parametrize("fuzz", [fuzz_config, fuzz_header])
def test_whatever_comes_is_read_or_refused(
    fuzz: Callable[[Path, int, int], Findings], tmp_path: Path
) -> None:
    findings = fuzz(tmp_path, COUNT, 1)
    assert findings.wrong == []
    assert sum(findings.outcomes.values()) == COUNT
    # It gets past the first check, and not everywhere.
    assert len(findings.outcomes) > 6, findings.outcomes
    assert 0 < findings.outcomes["read"] < COUNT / 2


def test_an_input_follows_from_its_seed() -> None:
    for make in (config_bytes, weights_bytes):
        first, again, other = (make(random.Random(seed)) for seed in ("a", "a", "b"))
        assert first == again != other


def spin() -> None:
    until = time.thread_time() + 0.15
    while time.thread_time() < until:
        pass


def crash() -> None:
    raise KeyError("r")


def chatter() -> None:
    raise AdapterRejected("x" * 9000, code="config_invalid")


@pytest.mark.parametrize("call", [spin, crash, chatter])
def test_it_notices(call: Callable[[], None]) -> None:
    findings = Findings()
    findings.look(7, call)
    assert len(findings.wrong) >= 1
    assert findings.wrong[0].startswith("7: ")

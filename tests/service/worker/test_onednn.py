"""oneDNN's kernels are there before a step needs them, and later steps add nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from adapters.worker.cpu import onednn
from tests.support.onednn_memory import SEQUENCES, SHAPES, TOKENS

KERNEL = 100_000  # bytes that one takes at least


def test_steps_add_nothing_to_what_was_made_ahead(tmp_path: Path) -> None:
    """In a process of its own, since what is counted is all that it has allocated."""
    command = [sys.executable, "-m", "tests.support.onednn_memory", str(tmp_path / "meeting")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["unprepared"] > (SEQUENCES - 2) * SHAPES * KERNEL
    assert (found["made"], found["rows"]) == (SHAPES * TOKENS + SEQUENCES, TOKENS)
    assert found["prepared"] < KERNEL


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(product, rows) in the order of the calls, of a model with two shapes and a head."""
    calls: list[tuple[str, int]] = []

    def call(name: str, rows: int) -> None:
        calls.append((name, rows))

    products = [(partial(call, "up"), 4), (partial(call, "down"), 4), (partial(call, "head"), 2)]
    monkeypatch.setattr(onednn, "_products", lambda *_: products)
    return calls


@pytest.mark.parametrize(
    ("capacity", "expected"), [("0", (0, 0)), ("2", (0, 0)), ("3", (3, 1)), ("7", (6, 2)), ("99", (10, 4))]
)
def test_no_more_are_made_than_are_kept(
    asked: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    capacity: str,
    expected: tuple[int, int],
) -> None:
    monkeypatch.setenv(onednn.CAPACITY, capacity)
    assert onednn.make_kernels(torch.nn.Module(), 4, 2) == expected
    assert len(asked) == expected[0]


def test_a_large_model_does_not_hold_up_the_start(
    asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "LONGEST_S", -1.0)
    assert onednn.make_kernels(torch.nn.Module(), 4, 2) == (0, 0)
    assert not asked


def test_a_model_without_such_products_has_nothing_to_make() -> None:
    assert onednn.make_kernels(torch.nn.Linear(2, 2), 4, 2) == (0, 0)

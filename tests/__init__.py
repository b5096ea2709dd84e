"""Tests; the helpers among them assert too, and pytest should say as much about those."""

import pytest

import server.engine  # noqa: F401  # says what vLLM reads when it is imported, before any test imports it

pytest.register_assert_rewrite(
    "tests.support.blobs",
    "tests.support.engine_calls",
    "tests.support.engine_suite",
    "tests.support.fleet_answers",
    "tests.support.pause_suite",
    "tests.support.peft_adapters",
    "tests.support.simulated_engine",
    "tests.support.spoiled",
    "tests.support.tiny",
    "tests.support.world",
)

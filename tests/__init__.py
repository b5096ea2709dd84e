"""Tests; the helpers among them assert too, and pytest should say as much about those."""

import pytest

pytest.register_assert_rewrite("tests.support.engine_suite", "tests.support.tiny", "tests.support.world")

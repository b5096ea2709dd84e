"""The environment that the engine starts in keeps customers apart."""

from __future__ import annotations

import os

import pytest

from server.engine import environment

COUNT, RAISE = "VLLM_COMPUTE_NANS_IN_LOGITS", "VLLM_RAISE_ON_LOGIT_NANS"


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*environment.REQUIRED, *environment.DEFAULTS):
        monkeypatch.setenv(name, "x")  # so that what is set below is taken back
        monkeypatch.delenv(name)


def test_what_is_not_set_is_set() -> None:
    environment.settle()
    assert (os.environ[COUNT], os.environ[RAISE]) == ("1", "0")
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    environment.settle()


def test_what_is_a_matter_of_taste_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv(COUNT, "1")
    environment.settle()
    assert os.environ["OMP_WAIT_POLICY"] == "active"


@pytest.mark.parametrize(
    ("name", "value"),
    [(COUNT, "0"), (COUNT, ""), (COUNT, "false"), (COUNT, "00"), (RAISE, "1"), (RAISE, "true")],
)
def test_what_switches_the_guard_off_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} is .* unset it"):
        environment.settle()

"""Whether a lost engine is started again, by example."""

from __future__ import annotations

from server.engine.restarts import WINDOW_S, Restarts


def test_the_wait_doubles_and_the_fourth_loss_in_the_window_is_the_last() -> None:
    restarts = Restarts(3)
    assert [restarts.lost(float(now)) for now in (0, 30, 60, 90)] == [1.0, 2.0, 4.0, None]


def test_what_is_longer_ago_than_the_window_does_not_count() -> None:
    restarts = Restarts(1)
    assert restarts.lost(0.0) == 1.0
    assert restarts.lost(WINDOW_S) == 1.0
    assert restarts.lost(WINDOW_S + 1) is None


def test_none_at_all_may_be_allowed() -> None:
    assert Restarts(0).lost(0.0) is None

"""Wrong keys by address: so many a minute, in bounded memory."""

from __future__ import annotations

import pytest

from server.accounts import wrong_keys as module
from server.accounts.wrong_keys import WINDOW_S, WrongKeys


def test_so_many_are_allowed_and_then_the_window_has_to_end() -> None:
    wrong = WrongKeys(3)
    assert [wrong.add("192.0.2.1", now) for now in (0.0, 1.0, 2.0)] == [None] * 3
    assert wrong.add("192.0.2.1", 10.0) == WINDOW_S - 10
    assert wrong.add("192.0.2.1", 59.0) == WINDOW_S - 59, "failing on does not make it longer"
    assert wrong.add("192.0.2.2", 59.0) is None
    assert wrong.add("192.0.2.1", WINDOW_S) is None


def test_zero_allows_any_number() -> None:
    wrong = WrongKeys(0)
    assert [wrong.add("192.0.2.1", 0.0) for _ in range(100)] == [None] * 100
    assert len(wrong) == 0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("192.0.2.1", "192.0.2.2", False),
        ("", "", True),
        ("fe80::1%eth0", "fe80::2%eth0", True),
    ],
)
def test_what_counts_as_one_address(one: str, other: str, same: bool) -> None:
    wrong = WrongKeys(1)
    wrong.add(one, 0.0)
    assert (wrong.add(other, 0.0) is not None) == same


def test_memory_is_bounded_and_the_oldest_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ADDRESSES", 100)
    wrong = WrongKeys(1)
    for number in range(1000):
        wrong.add(f"10.0.{number // 250}.{number % 250}", 0.0)
        wrong.add("192.0.2.1", 0.0)
    assert len(wrong) == 100
    assert wrong.add("192.0.2.1", 0.0) is not None
    assert wrong.add("10.0.0.0", 0.0) is None

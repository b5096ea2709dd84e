"""What golden probes showed on several kinds of engine."""

from __future__ import annotations

from typing import Any

from adapters.store.verdicts import KINDS_KEPT, has_verdict, with_verdict


def found(engine: str, **more: Any) -> dict[str, Any]:
    return {"base": "b", "dtype": "float32", "engine": engine, "matches": True, **more}


def here(engine: str) -> dict[str, Any]:
    return {"base": "b", "dtype": "float32", "engine": engine}


def test_each_kind_of_engine_has_a_verdict_of_its_own() -> None:
    report = with_verdict({"rank": 8}, found("1"))
    assert report == {"rank": 8, "golden": found("1")}
    assert has_verdict(report, here("1"))
    assert not has_verdict(report, here("2"))
    report = with_verdict(report, found("2", matches=False))
    assert has_verdict(report, here("1"))
    assert has_verdict(report, here("2"))
    assert not has_verdict(report, here("2") | {"dtype": "bfloat16"})
    assert (report["golden"], report["golden_elsewhere"]) == (found("2", matches=False), [found("1")])
    report = with_verdict(report, found("1", matches=False))
    assert report["golden_elsewhere"] == [found("2", matches=False)], "a new verdict replaces the old one"
    assert report["golden"] == found("1", matches=False)


def test_the_oldest_are_forgotten() -> None:
    report: dict[str, Any] = {}
    for number in range(KINDS_KEPT + 2):
        report = with_verdict(report, found(str(number)))
    assert [one["engine"] for one in report["golden_elsewhere"]] == ["4", "3", "2"]
    assert not has_verdict({"golden": None}, here("1"))

"""A request's record as the guards look at it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.store.rollouts import Record
from server.rollouts.guards import Evidence, Guards, Seen
from server.rollouts.stored import seen_of

DONE = Record(1, 2, "completed", 0.5, 0.75, 2.75, 5, "stop")


def test_an_answer_of_tokens() -> None:
    assert seen_of(DONE) == Seen(first_token=0.25, token=0.5, length=5, cut=False)
    assert seen_of(replace(DONE, finish="length", output_tokens=1)) == Seen(
        first_token=0.25, length=1, cut=True
    )


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_an_answer_without_tokens_has_begun_when_it_is_there(first: float) -> None:
    """Embeddings, labels and scores: a new version that is slower at them is told by nothing else."""
    record = replace(DONE, output_tokens=0, first_token_seconds=first, finish=None)
    assert seen_of(record) == Seen(first_token=2.25)


def test_a_version_that_makes_embeddings_twice_as_slowly_goes_back() -> None:
    evidence = Evidence(Guards())
    for _ in range(60):
        for version, seconds in ((1, 1.0), (2, 2.0)):
            record = replace(DONE, output_tokens=0, finish=None, queue_seconds=0.0, seconds=seconds)
            request = seen_of(record)
            assert request is not None
            evidence.see(request, is_new=version == 2)
    harm = [finding.guard for finding in evidence.findings() if finding.verdict == "harm"]
    assert harm == ["first_token"]


@pytest.mark.parametrize(
    "code", ["queue_timeout", "server_overloaded", "shutting_down", "no_replica", "store_unavailable"]
)
def test_what_got_no_turn_says_nothing_of_the_version(code: str) -> None:
    assert seen_of(replace(DONE, outcome="unavailable", code=code)) == Seen(unanswered=True)
    assert seen_of(replace(DONE, outcome="disconnected")) == Seen(unanswered=True)
    assert seen_of(replace(DONE, outcome="refused", code="rate_limit_exceeded")) is None


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        ("quarantined", "adapter_quarantined"),
        ("unavailable", "adapter_damaged"),
        ("unavailable", "adapter_unavailable"),
        ("unavailable", "engine_restarting"),
        ("unavailable", None),
        ("failed", "internal_error"),
    ],
)
def test_what_fails_because_of_the_version_or_in_it(outcome: str, code: str | None) -> None:
    assert seen_of(replace(DONE, outcome=outcome, code=code)) == Seen(failed=True)
    assert seen_of(replace(DONE, outcome="rejected")) == Seen(refused=True)

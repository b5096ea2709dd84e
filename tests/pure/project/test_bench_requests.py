"""What the benchmarks ask, and when: draws, arrivals, traces, and the client and its loops; no engine."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import statistics
from collections import Counter
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.bench.adapters import Adapter
from tests.bench.client import NEVER_END, Client, Record, Target
from tests.bench.scenario import Round
from tests.bench.workload import (
    Arrival,
    closed_loop,
    distinct,
    gamma_arrivals,
    identical,
    log_normal_lengths,
    open_loop,
    parse_trace,
    prompt,
    uniform,
    zipf,
)
from tests.pure.project.test_bench import record

DRAWS = 20_000


def drawn(indices: itertools.chain[int] | object, count: int = DRAWS) -> Counter[int]:
    return Counter(itertools.islice(indices, count))  # type: ignore[call-overload]


# Popularity, arrivals and lengths


def test_identical_and_distinct() -> None:
    assert drawn(identical(), 7) == {0: 7}
    assert list(itertools.islice(distinct(3), 7)) == [0, 1, 2, 0, 1, 2, 0]


def test_uniform_is_even() -> None:
    counts = drawn(uniform(8, random.Random(1)))
    assert set(counts) == set(range(8))
    assert all(abs(n - DRAWS / 8) < 0.1 * DRAWS / 8 for n in counts.values())


@pytest.mark.parametrize("s", [0.8, 1.0, 1.2])
def test_zipf_falls_as_a_power_of_the_rank(s: float) -> None:
    counts = drawn(zipf(32, s, random.Random(2)))
    harmonic = sum((k + 1) ** -s for k in range(32))
    for k in (0, 1, 3, 7):
        assert counts[k] == pytest.approx(DRAWS * (k + 1) ** -s / harmonic, rel=0.12)


def test_the_same_seed_makes_the_same_choices_and_another_round_others() -> None:
    def choices(round_: Round) -> list[int]:
        return list(itertools.islice(zipf(32, 1.0, round_.rng(1)), 50))

    assert choices(Round(0)) == choices(Round(0))
    assert choices(Round(0)) != choices(Round(1))
    assert Round(0).rng(1).random() != Round(0).rng(2).random()


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_gamma_arrivals_have_their_rate_and_burstiness(cv: float) -> None:
    times = list(itertools.islice(gamma_arrivals(5.0, cv, random.Random(3)), DRAWS))
    between = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(between) == pytest.approx(0.2, rel=0.1)
    assert statistics.stdev(between) / statistics.mean(between) == pytest.approx(cv, rel=0.1)


def test_log_normal_lengths() -> None:
    lengths = list(itertools.islice(log_normal_lengths(32, 0.6, 100, random.Random(4)), DRAWS))
    assert statistics.median(lengths) == pytest.approx(32, abs=1)
    assert min(lengths) >= 1
    assert max(lengths) == 100


def test_prompts_do_not_share_a_beginning() -> None:
    rng = random.Random(5)
    first, second = prompt(16, rng), prompt(16, rng)
    assert len(first.split()) == 16
    assert first.split()[:4] != second.split()[:4]


# Traces


def row(timestamp: float, model: str = "a", **fields: object) -> str:
    return json.dumps(
        {"timestamp": timestamp, "input_length": 3, "output_length": 4, "model": model} | fields
    )


def test_a_trace_is_sorted_and_begins_at_zero() -> None:
    assert parse_trace([row(2500, "b"), "", row(1000)]) == [Arrival(0.0, 3, 4, "a"), Arrival(1.5, 3, 4, "b")]
    assert parse_trace([]) == []


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"timestamp": 1}', row(1, output_length=0), row(1, input_length="many")]
)
def test_a_wrong_line_of_a_trace_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="line 2 of the trace"):
        parse_trace([row(0), line])


# The client and its loops


class Chunks(httpx.AsyncByteStream):
    """Cut in the middle of an event, as networks do."""

    def __init__(self, text: str) -> None:
        self._data = text.encode()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self._data), 7):
            yield self._data[start : start + 7]


class Here:
    def request(self, adapter: Adapter | None, body: dict[str, object]) -> Target:
        return Target("http://here/v1/completions", {"Authorization": "Bearer k"}, {"model": "m", **body})


def event(text: str) -> str:
    return f"data: {json.dumps({'choices': [{'text': text}], 'usage': None})}\n\n"


USAGE = 'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}\n\n'


async def answered(
    monkeypatch: pytest.MonkeyPatch, status: int, text: str
) -> tuple[Record, list[httpx.Request]]:
    asked: list[httpx.Request] = []

    async def answer(self: object, request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(status, stream=Chunks(text))

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", answer)
    async with Client(Here()) as client:
        made = await client.ask(Adapter(8, 0), "hello", 3)
        assert client.records == [made]
    return made, asked


async def test_the_client_notes_every_chunk_and_the_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    made, (asked,) = await answered(
        monkeypatch, 200, event("a") + event("") + event("b") + USAGE + "data: [DONE]\n\n"
    )
    assert made.error is None
    assert (len(made.chunks), made.prompt_tokens, made.output_tokens) == (3, 5, 3)
    assert made.text == "ab"
    assert made.arrival <= made.chunks[0] <= made.chunks[-1] <= (made.end or 0)
    body = json.loads(asked.content)
    assert (body["model"], body["max_tokens"], body["logit_bias"]) == ("m", 3, NEVER_END)


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (503, '{"error": {"message": "full"}}', "full"),
        (200, event("a"), "the stream broke off"),
        (200, event("a") + 'data: {"error": {"message": "cut"}}\n\ndata: [DONE]\n\n', "cut"),
    ],
)
async def test_the_client_tells_what_failed(
    monkeypatch: pytest.MonkeyPatch, status: int, text: str, said: str
) -> None:
    made, _ = await answered(monkeypatch, status, text)
    assert said in (made.error or "")
    assert made.status == status
    assert made.duration == math.inf


async def test_a_closed_loop_has_one_request_of_each_client_at_a_time() -> None:
    running: Counter[int] = Counter()
    finished: Counter[int] = Counter()
    enough = asyncio.Event()

    async def ask(number: int) -> Record:
        running[number] += 1
        assert running[number] == 1
        await asyncio.sleep(0)
        running[number] -= 1
        finished[number] += 1
        if sum(finished.values()) >= 30:
            enough.set()
        return record(end=1.0)

    async with closed_loop(3, ask, drain=True):
        await enough.wait()
    assert set(finished) == {0, 1, 2}
    assert not +running, "a drained loop leaves nothing running"


async def test_a_closed_loop_gives_up_what_runs_and_does_not_hide_a_fault() -> None:
    async with asyncio.timeout(120):
        async with closed_loop(2, lambda _: asyncio.Event().wait()):  # type: ignore[arg-type,return-value]
            await asyncio.sleep(0)

    async def broken(number: int) -> Record:
        raise LookupError("no such adapter")

    with pytest.raises(LookupError):
        async with closed_loop(1, broken):
            await asyncio.sleep(0)


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    begun: list[str] = []
    everyone = asyncio.Event()

    async def ask(arrival: Arrival, at: float) -> Record:
        begun.append(arrival.model)
        if len(begun) == 3:
            everyone.set()
        await everyone.wait()
        return record(arrival=at)

    arrivals = [Arrival(at, 1, 1, model) for at, model in ((0.0, "a"), (0.01, "b"), (0.02, "c"))]
    async with asyncio.timeout(120):
        records = await open_loop(arrivals, ask)
    assert begun == ["a", "b", "c"]
    assert records[2].arrival - records[0].arrival == pytest.approx(0.02)

"""One customer asks for three times its limits for two minutes, and three others go on beside it.

The three, each one client of short answers with an adapter of its own, are first measured with nobody else.
Then sixteen clients of a customer with a limit of requests a minute ask too, and after them sixteen of one
with a limit of tokens a minute. What these got, as the answers' ``usage`` has it, is compared with what the
limits allow, in all and in the fullest 60 seconds. The three's p99 of the first token beside each is compared
with theirs alone: what a limited customer is allowed does use the engine, in bursts of about a third of each
minute, so the ratio contains that, and what refusing costs. The latter alone is shown too: the p99 of those
first tokens during whose wait no answer of the limited customer ran. Not part of a full run; ``--minutes``
makes each of the three phases shorter or longer.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from tests.bench.adapters import Adapter, of_rank
from tests.bench.client import Client, Record
from tests.bench.scenario import Goal, Measure, Round, Scenario, Values
from tests.bench.servers import Loraplex, Server
from tests.bench.stats import most_within, percentile
from tests.bench.workload import closed_loop, prompt, warm

BY_REQUESTS, BY_TOKENS, *OTHERS = of_rank(8, 5, first=1200)
CLIENTS = 16
TIMES = 3.0
INPUT, OUTPUT = 8, 8  # tokens, of the others
SHORT = 2  # tokens of a limited customer's prompts
MINUTES = 2.0
MINUTE = 60.0
NEAR = 0.99  # of what is allowed


@dataclass(frozen=True, slots=True)
class Phase:
    """``outputs`` are the lengths of answers, asked for in turn."""

    limit: str
    adapter: Adapter
    per_minute: int
    outputs: tuple[int, ...]

    @property
    def rate(self) -> float:
        """Requests a second that come to ``TIMES`` the limit."""
        each = 1 if self.limit == "requests" else SHORT + sum(self.outputs) / len(self.outputs)
        return TIMES * self.per_minute / each / MINUTE


PHASES = (
    Phase("requests", BY_REQUESTS, 60, (4,)),
    # A request is refused if all it may use is not left. Some are so small that less than 1 % stays unused.
    Phase("tokens", BY_TOKENS, 600, (1, 4, 16)),
)


async def measure(server: Server, client: Client, round_: Round) -> Values:
    assert isinstance(server, Loraplex)
    # Nothing counts before there are limits: whoever is warmed here still has a whole minute's worth.
    await warm(server, client, [BY_REQUESTS, BY_TOKENS, *OTHERS])
    rng = round_.rng()
    seconds = half_minutes(round_.minutes or round_.seconds(MINUTES, 0.5))

    def others(label: str) -> AbstractAsyncContextManager[None]:
        async def ask(number: int) -> Record:
            return await client.ask(OTHERS[number], prompt(INPUT, rng), OUTPUT, label=label)

        return closed_loop(len(OTHERS), ask, drain=True)

    async with others("alone"):
        await asyncio.sleep(seconds)
    alone = client.labelled("alone")
    values: Values = {"alone_p99": _p99(alone), "unexpected": sum(r.error is not None for r in alone)}
    for phase in PHASES:
        await server.limit(phase.adapter, {f"{phase.limit}_per_minute": phase.per_minute})
        beside = f"beside {phase.limit}"
        async with others(beside):
            await _press(client, round_, phase, seconds)
        asked = client.labelled(phase.limit)
        p99 = _p99(client.labelled(beside))
        refused_p99 = _p99(beside_refusals(client.labelled(beside), asked))
        values |= {f"{phase.limit}_{key}": v for key, v in compared(phase, asked, seconds).items()}
        values |= {f"{phase.limit}_p99": p99, f"{phase.limit}_to_alone": p99 / values["alone_p99"]}
        values[f"{phase.limit}_refusals_to_alone"] = refused_p99 / values["alone_p99"]
        values["unexpected"] += sum(not _expected(r) for r in asked)
        values["unexpected"] += sum(r.error is not None for r in client.labelled(beside))
    return values


async def _press(client: Client, round_: Round, phase: Phase, seconds: float) -> None:
    """Each client asks at its own times, and passes over those at which it still waits for an answer."""
    rng, begin = round_.rng(1), time.perf_counter()

    async def ask(number: int) -> None:
        turn = number
        while turn < seconds * phase.rate:
            await asyncio.sleep(begin + turn / phase.rate - time.perf_counter())
            output = phase.outputs[turn % len(phase.outputs)]
            await client.ask(phase.adapter, prompt(SHORT, rng), output, label=phase.limit)
            passed = (time.perf_counter() - begin) * phase.rate - turn
            turn += CLIENTS * max(1, math.ceil(passed / CLIENTS))

    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(ask(number))


def half_minutes(minutes: float) -> float:
    """In seconds, rounded up: the shortest time in which all that a new minute allows is asked for."""
    return MINUTE / 2 * max(1, math.ceil(2 * minutes))


def allowed(per_minute: int, seconds: float) -> int:
    """What a limit allows to one who begins with nothing used.

    Windows slide. At the start a whole minute's worth is there at once, and at three times the limit it is
    gone after a third of a minute. Each part of it is free again a minute after its use (at most a tenth of a
    second later, ``rate.GRAIN_S``), and is then taken by the next who asks. So the second minute is as
    the first, and one that has only begun counts whole, if a third of it and some is over: ``seconds`` are
    from ``half_minutes``. More cannot be: the time is covered by so many windows of 60 seconds.
    """
    return per_minute * math.ceil(seconds / MINUTE)


def compared(phase: Phase, asked: Sequence[Record], seconds: float) -> Values:
    """What was asked for, what was had, and the most had in any 60 seconds, each to what is allowed.

    The server counts a request between its start and its first token, and its tokens until its end. With
    windows that hold all of that, what is found is never more than what the server counted.
    """
    if phase.limit == "requests":
        events = [(r.arrival, r.chunks[0], 1) for r in asked if r.chunks]
    else:
        events = [(r.arrival, r.end, _tokens(r)) for r in asked if r.chunks and r.end is not None]
    return {
        "asked": len(asked) / (phase.rate / TIMES * seconds),
        "admitted": sum(amount for *_, amount in events) / allowed(phase.per_minute, seconds),
        "fullest": most_within(MINUTE, events) / phase.per_minute,
    }


def beside_refusals(others: Sequence[Record], asked: Sequence[Record]) -> list[Record]:
    """Those of ``others`` that waited for their first token while no answer to ``asked`` ran."""
    answers = [(r.arrival, r.end) for r in asked if r.chunks and r.end is not None]
    return [
        r
        for r in others
        if not any(begin <= r.arrival + r.to_first_token and end >= r.arrival for begin, end in answers)
    ]


def _tokens(record: Record) -> int:
    return (record.prompt_tokens or 0) + (record.output_tokens or 0)


def _expected(record: Record) -> bool:
    """An answer, whole and with its usage; or 429 of the limit, with a time to wait."""
    if record.status != 429:
        return record.status == 200 and record.error is None and _tokens(record) > 0
    try:
        code = json.loads(record.error or "")["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return False
    return code == "rate_limit_exceeded" and record.retry_after is not None and record.retry_after >= 1


def _p99(records: Sequence[Record]) -> float:
    return percentile([r.to_first_token for r in records], 99)


def _measures() -> tuple[Measure, ...]:
    rows = [Measure("alone_p99", "others' first token alone, p99", "s")]
    for limit in (phase.limit for phase in PHASES):
        rows += [
            Measure(f"{limit}_asked", f"{limit} asked for, to the limit", "×"),
            Measure(f"{limit}_admitted", f"{limit} had, to what is allowed", "×", Goal("value", "≥", NEAR)),
            Measure(
                f"{limit}_fullest", f"{limit} in the fullest 60 s, to the limit", "×", Goal("value", "≤", 1)
            ),
            Measure(f"{limit}_p99", f"others beside the limit of {limit}, p99", "s"),
            Measure(f"{limit}_to_alone", f"{limit}: others' p99 to alone", "×", Goal("value", "≤", 1.2)),
            Measure(f"{limit}_refusals_to_alone", "the same, of those beside refusals only", "×"),
        ]
    rows.append(Measure("unexpected", "neither whole answers nor proper 429s", "", Goal("value", "≤", 0)))
    return tuple(rows)


SCENARIO = Scenario(
    "limited",
    _measures(),
    lambda _: (BY_REQUESTS, BY_TOKENS, *OTHERS),
    measure,
    # A slot for each, so that what is measured is neither loads nor turns for slots.
    servers=("loraplex",),
    runs=1,
    longest=None,
)

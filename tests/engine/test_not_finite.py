"""An adapter that makes NaN hurts nobody else: on the real engine, before, during and after."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from server.engine.calls import PageOp
from server.engine.engine import Engine
from server.errors import Internal
from tests.engine.reference import ATTENTION, MLP, Reference, Spec
from tests.support.engine_calls import ask, bring_in, call, said, then
from tests.support.overflow import make_overflowing

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

PROMPTS = [
    "The sky is",
    "Once upon a time there was a",
    "Red, green and",
    "One two three four five six seven",
]


@pytest_asyncio.fixture(loop_scope="session")
async def engine(quiet: Engine) -> AsyncIterator[Engine]:
    """``quiet``, holding no adapter before or after."""
    yield quiet
    quiet.on_fault = lambda model, reason: None
    held = await quiet.report()
    await quiet.page([PageOp("evict", load) for load in held.host])


async def answers(engine: Engine, load: PageOp | None) -> list[str]:
    """What everybody else gets, one after the other, in blocks that others have freed."""
    told = []
    for prompt in PROMPTS:
        body = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
        answer, _ = await ask(engine, "completion", body, load)
        assert answer.body is not None
        told.append(said(answer.body))
    return told


def with_trigger(token: int, length: int, **changes: Any) -> dict[str, Any]:
    ids = [500 + i for i in range(length)]
    ids[length // 2] = token
    return {"prompt": ids, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **changes}


async def read(engine: Engine, body: dict[str, Any], load: PageOp) -> None:
    """Asks and reads the answer to its end, which it should not have."""
    answer, _ = await ask(engine, "completion", body, load)
    if answer.stream is not None:
        async for _ in answer.stream:
            pass


async def test_nobody_elses_answer_changes_by_a_token(
    engine: Engine, reference: Reference, base_dir: Path, tmp_path: Path
) -> None:
    healthy = await asyncio.to_thread(reference.make, Spec(3, 8, ATTENTION + MLP), tmp_path / "healthy")
    token = await asyncio.to_thread(make_overflowing, base_dir, tmp_path / "overflowing")
    other, bad = await bring_in(engine, healthy), await bring_in(engine, tmp_path / "overflowing")
    wanted = [await answers(engine, None), await answers(engine, other)]
    assert all(text for texts in wanted for text in texts)
    faults: list[tuple[str, str]] = []
    engine.on_fault = lambda model, reason: faults.append((model, reason))

    async def overflow(length: int, **changes: Any) -> None:
        with pytest.raises(Internal) as failed:
            await read(engine, with_trigger(token, length, **changes), bad)
        assert failed.value.code == "adapter_not_finite"

    beside = asyncio.gather(*(answers(engine, load) for load in (None, other, None)))
    for i in range(5):
        await asyncio.gather(overflow(8 + 27 * i), overflow(9 + 48 * i, stream=True))
    assert await beside == [wanted[0], wanted[1], wanted[0]]
    assert [await answers(engine, None), await answers(engine, other)] == wanted
    assert {model for model, _ in faults} == {bad.name}
    assert len(faults) == 10
    # Without its trigger it is an adapter like any other, and its slot can be given to another.
    answer, _ = await ask(engine, "completion", {"prompt": "Hello", "max_tokens": 4}, bad)
    assert answer.body is not None
    (result,) = (await engine.page([then("evict", bad)])).results
    assert result.error is None


async def test_a_prompt_in_pieces_reports_what_its_first_piece_made(
    engine: Engine, base_dir: Path, tmp_path: Path
) -> None:
    token = await asyncio.to_thread(make_overflowing, base_dir, tmp_path / "overflowing")
    bad = await bring_in(engine, tmp_path / "overflowing")
    body = with_trigger(token, 900)
    body["prompt"][900 // 2] = 500
    body["prompt"][1] = token
    loud = [call(engine, "completion", {"prompt": [700 + i] * 800, "max_tokens": 2}, None) for i in range(4)]
    beside = asyncio.gather(*(engine.answer(made, request) for made, request in loud))
    made, request = call(engine, "completion", body, bad)
    with pytest.raises(Internal) as failed:
        await engine.answer(made, request)
    assert failed.value.code == "adapter_not_finite"
    await beside

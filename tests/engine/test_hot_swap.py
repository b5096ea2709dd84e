"""A new version every two seconds under streaming clients, on the real engine with its prefix cache.

``SWAP_MINUTES=3 python -m pytest --timeout 900 tests/engine/test_hot_swap.py`` takes its time: one every five
seconds, under 16 clients.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.engine.reference import ATTENTION, Reference, Spec
from tests.support.site import Site
from tests.support.swapping import swap_under_load

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

MINUTES = float(os.environ.get("SWAP_MINUTES", "0"))
SWAPS, CLIENTS, EVERY = (round(MINUTES * 12), 16, 5) if MINUTES else (4, 8, 1)
BODY = {
    "model": "a",
    "messages": [{"role": "user", "content": "What should I do when my parcel has not arrived? " * 4}],
    "max_tokens": 8,
    "temperature": 0,
}


async def test_every_answer_is_of_one_version(site: Site, reference: Reference, tmp_path: Path) -> None:
    assert site.services.engine._llm.vllm_config.cache_config.enable_prefix_caching
    folders = []
    for seed in range(SWAPS + 1):
        spec = Spec(seed=7000 + seed, rank=8, targets=ATTENTION)
        folders.append(await asyncio.to_thread(reference.make, spec, tmp_path / str(seed)))
    key = await site.tenant("swapping", {"a": folders[0]})
    waiting = iter(folders[1:])

    async def swap() -> None:
        made = await site.upload("swapping", "a", next(waiting))
        assert made.status_code == 201, made.text

    answers = await swap_under_load(site, key, BODY, swap, clients=CLIENTS, swaps=SWAPS, every=EVERY)
    texts = []
    for number in range(1, SWAPS + 2):
        alone = await site.chat(key, "", **(BODY | {"model": f"a@{number}"}))
        assert alone.status_code == 200, alone.text
        texts.append(alone.json()["choices"][0]["message"]["content"])
    assert len(set(texts)) == SWAPS + 1, "the versions can be told apart"
    for answer in answers:
        assert answer.text in texts[answer.begun : answer.ended + 2], "it mixes versions, or one was not live"
    assert len({answer.text for answer in answers}) > 1, "nothing was swapped under load"
    assert (await site.services.engine.report()).in_step_loads == 0

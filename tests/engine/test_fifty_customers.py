"""Fifty customers, each with an adapter of the same name, through eight slots: every answer is their own."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from tests.engine.conftest import GPU_SLOTS, HOST_SLOTS
from tests.engine.reference import ATTENTION, MLP, Answer, Reference, Spec
from tests.support.site import Site

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

CUSTOMERS = 50
LENGTH = 8
PROMPT = "What should I do when my parcel has not arrived?"
TOLERANCE = 1e-3

TARGETS = (("q_proj", "v_proj"), ATTENTION, MLP, ("q_proj", "down_proj"))


def specs() -> list[Spec]:
    kinds = itertools.cycle(itertools.product((8, 16, 32, 64), TARGETS))
    return [
        Spec(seed=i, rank=rank, targets=targets, alpha=16 + i % 3 * 8, rslora=i % 7 == 0)
        for i, (rank, targets) in zip(range(CUSTOMERS), kinds, strict=False)
    ]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def customers(
    site: Site, reference: Reference, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, Path]]:
    """tenant -> (key, adapter folder)."""
    root = tmp_path_factory.mktemp("adapters")
    folders = [reference.make(spec, root / str(i)) for i, spec in enumerate(specs())]
    room = asyncio.Semaphore(4)  # so that the probes of several share the engine's steps

    async def settle(i: int) -> str:
        async with room:
            return await site.tenant(f"customer-{i}", {"support": folders[i]})

    keys = await asyncio.gather(*map(settle, range(CUSTOMERS)))
    return {f"customer-{i}": (key, folder) for i, (key, folder) in enumerate(zip(keys, folders, strict=True))}


async def answer(site: Site, key: str, model: str = "support") -> Answer:
    fields = {"max_tokens": LENGTH, "temperature": 0, "logprobs": True, "top_logprobs": 1}
    response = await site.chat(key, PROMPT, model=model, return_token_ids=True, **fields)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return Answer(tuple(choice["token_ids"]), tuple(one["logprob"] for one in choice["logprobs"]["content"]))


async def check(reference: Reference, folder: Path | None, got: Answer) -> None:
    """``got`` is the greedy answer of PEFT's adapter, token by token and within the tolerance."""
    want = await asyncio.to_thread(reference.score, folder, reference.chat_ids(PROMPT), got.tokens)
    assert got.tokens == want.tokens, folder
    assert got.log_probs == pytest.approx(want.log_probs, abs=TOLERANCE), folder


def apart(one: Answer, other: Answer) -> bool:
    """Whether neither could pass for the other in ``check``."""
    if one.tokens != other.tokens:
        return True
    return max(abs(a - b) for a, b in zip(one.log_probs, other.log_probs, strict=True)) > 2 * TOLERANCE


def engine_memory() -> int:
    """Unique bytes of the engine's processes, which are this process's children."""
    return sum(p.memory_full_info().uss for p in psutil.Process().children(recursive=True))


async def test_every_answer_is_the_customers_own(
    site: Site, reference: Reference, customers: dict[str, tuple[str, Path]]
) -> None:
    engine = site.services.engine
    start = engine_memory()
    order = list(customers) * 2
    random.Random(1).shuffle(order)
    room = asyncio.Semaphore(16)

    async def ask(tenant: str) -> tuple[str, Answer]:
        async with room:
            return tenant, await answer(site, customers[tenant][0])

    answers = await asyncio.gather(*(ask(tenant) for tenant in order))
    grown = engine_memory() - start

    first = dict(answers)
    assert len({got.tokens for got in first.values()}) > CUSTOMERS / 2
    for one, other in itertools.combinations(customers, 2):
        assert apart(first[one], first[other]), f"{one} and {other} could pass for each other"
    for tenant, (_, folder) in customers.items():
        await check(reference, folder, first[tenant])
    for tenant, got in answers:
        assert got.tokens == first[tenant].tokens, tenant
        assert got.log_probs == pytest.approx(first[tenant].log_probs, abs=TOLERANCE), tenant

    report = await engine.report()
    assert report.in_step_loads == 0
    assert len(report.host) <= HOST_SLOTS
    largest = max(_bytes(folder) for _, folder in customers.values())
    assert grown <= HOST_SLOTS * largest * 1.5, f"{grown / 1e6:.0f} MB for adapters of {largest / 1e6:.0f} MB"


async def test_same_prompt_and_name_of_two_tenants_differ_with_prefix_caching(
    site: Site, reference: Reference, customers: dict[str, tuple[str, Path]]
) -> None:
    (first, first_dir), (second, second_dir) = customers["customer-1"], customers["customer-2"]
    # Twice each and interleaved, so that the second time comes out of the prefix cache.
    answers = [await answer(site, key) for key in (first, second, first, second)]
    for got, folder in zip(answers, (first_dir, second_dir) * 2, strict=True):
        await check(reference, folder, got)
    assert answers[0].tokens != answers[1].tokens


async def test_the_base_answers_as_itself_beside_full_slots(
    site: Site, reference: Reference, customers: dict[str, tuple[str, Path]]
) -> None:
    """vLLM's own CPU kernels would give a token without an adapter the weights of the last slot."""
    tenants = [f"customer-{i}" for i in range(GPU_SLOTS)]
    keys = [customers[tenant][0] for tenant in tenants]
    await asyncio.gather(*(answer(site, key) for key in keys))
    assert None not in (await site.services.engine.report()).slots
    base, *others = await asyncio.gather(
        answer(site, keys[0], "SmolLM2-135M-Instruct"), *(answer(site, key) for key in keys)
    )
    await check(reference, None, base)
    for tenant, got in zip(tenants, others, strict=True):
        await check(reference, customers[tenant][1], got)


def _bytes(folder: Path) -> int:
    return (folder / "adapter_model.safetensors").stat().st_size

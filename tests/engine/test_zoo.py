"""Every adapter of the zoo, on a Llama and on a Qwen: served as it was trained, or refused with the code."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
import torch

from server.app import create_app
from server.settings import Settings
from tests.support.resting import RESTING
from tests.support.site import ADMIN_KEY, SERVICE_KEY, Site, bearer, serving
from tests.support.trainer import breed, make_base
from tests.support.truth import Truth, answer, echoed, heard, words
from tests.support.zoo import MAX_RANK, SPECIMENS

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

TOLERANCE = 1e-2
# A base that answers in place of an adapter must not pass for it.
LEAST_EFFECT = 10 * TOLERANCE


@dataclass(frozen=True)
class Zoo:
    """``bred``: name -> its folder, and its truth if it is to be served. ``bare`` is what the base says, of
    the ``kind`` of ``make_base``."""

    kind: str
    site: Site
    key: str
    bare: Truth
    bred: dict[str, tuple[Path, Truth | None]]

    async def upload(self, name: str) -> httpx.Response:
        """As a customer would: every file of the folder."""
        files = {path.name: path.read_bytes() for path in self.bred[name][0].iterdir() if path.is_file()}
        return await self.site.admin.post(f"/admin/v1/tenants/zoo/adapters/{_id(name)}/versions", files=files)

    async def ask(self, model: str) -> Truth:
        response = await self.site.http.post("/v1/completions", json=echoed(model), headers=bearer(self.key))
        assert response.status_code == 200, response.text
        return heard(response.json())


def _id(name: str) -> str:
    return f"specimen-{list(SPECIMENS).index(name)}"


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["llama", "qwen"])
async def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Zoo]:
    root = tmp_path_factory.mktemp(request.param)
    base = make_base(request.param, root / "base")
    settings = Settings(
        model=str(root / "base"),
        data_dir=root / "data",
        admin_key=ADMIN_KEY,
        service_key=SERVICE_KEY,
        gpu_slots=16,
        host_slots=32,
        max_lora_rank=MAX_RANK,
        max_uploads=1000,
        max_uploads_each=1000,
        max_model_len=128,
        engine_args={
            **RESTING,
            "dtype": "float32",
            "max_num_seqs": 16,
            "tokenizer": str(root / "base" / "tokenizer"),
        },
        log_format="text",
        log_level="warning",
    )

    def breed_all() -> dict[str, tuple[Path, Truth | None]]:
        torch.set_num_threads(1)
        return {
            name: (root / _id(name), breed(base, name, one, root / _id(name)))
            for name, one in SPECIMENS.items()
        }

    breeding = asyncio.create_task(asyncio.to_thread(breed_all))
    async with serving(create_app(settings)) as site:
        yield Zoo(request.param, site, await site.tenant("zoo"), answer(base.fresh()), await breeding)


async def test_each_is_served_as_it_was_trained_or_refused(zoo: Zoo) -> None:
    room = asyncio.Semaphore(6)  # each waits two minutes at most for its turn to be tried
    wrong: dict[str, str] = {}

    async def check(name: str) -> None:
        async with room:
            if said := await _fault(zoo, name):
                wrong[name] = said

    await asyncio.gather(*map(check, SPECIMENS))
    assert wrong == {}
    assert (await zoo.site.services.engine.report()).in_step_loads == 0
    assert (await zoo.ask(zoo.site.services.engine.base.name)).ids == zoo.bare.ids


async def _fault(zoo: Zoo, name: str) -> str | None:
    """What is wrong with what became of it; None if it is as the zoo says."""
    one, (_, truth) = SPECIMENS[name], zoo.bred[name]
    uploaded = await zoo.upload(name)
    if expected := one.code_on(zoo.kind):
        code = uploaded.json().get("error", {}).get("code")
        as_expected = (uploaded.status_code, code) == (422, expected)
        return None if as_expected else f"{uploaded.status_code} {uploaded.text[:300]}"
    if uploaded.status_code != 201:
        return uploaded.text[:300]
    assert truth is not None
    if bool(uploaded.json()["report"]["conversions"]) != one.converted:
        return f"conversions: {uploaded.json()['report']['conversions']}"
    got = await zoo.ask(_id(name))
    if got.ids != truth.ids:
        return f"said {words(got.ids)} instead of {words(truth.ids)}"
    if got.apart(truth) > TOLERANCE:
        return f"log-probabilities are {got.apart(truth):.3g} apart"
    if truth.ids == zoo.bare.ids and truth.apart(zoo.bare) < LEAST_EFFECT:
        return "the base says the same"
    return None

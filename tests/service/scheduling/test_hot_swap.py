"""A new version goes live under load: no errors, and every answer is wholly of one version that was live."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.swapping import swap_under_load
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

SWAPS = 20
LENGTH = 30
BODY = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": LENGTH}
REST = "".join(f" {i}" for i in range(1, LENGTH))


@pytest.mark.parametrize("how", ["upload", "roll back and forth"])
async def test_every_answer_is_of_one_live_version(how: str, tmp_path: Path) -> None:
    engine = FakeEngine(tiny.base(), times=Times(stage=0.02, activate=0.005, step=0.002))
    async with fake_site(tmp_path, engine, slot_patience=0.05) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(0)})
        await site.upload("acme", "a", tiny.adapter(1))
        shown = (await site.admin.get("/admin/v1/tenants/acme/adapters/a")).json()
        digests = [version["digest"] for version in shown["versions"]]
        live = [digests[1]]

        async def swap() -> None:
            if how == "upload":
                made = await site.upload("acme", "a", tiny.adapter(2 + len(live)))
                assert made.status_code == 201, made.text
                live.append(made.json()["digest"])
                return
            number = len(live) % 2
            moved = await site.admin.patch("/admin/v1/tenants/acme/adapters/a", json={"live": number + 1})
            assert moved.status_code == 200, moved.text
            live.append(digests[number])

        answers = await swap_under_load(
            site, key, BODY, swap, clients=8, swaps=SWAPS, every=0.0, all_ask=True
        )
        assert len(answers) > SWAPS
        for answer in answers:
            digest, rest = answer.text[:64], answer.text[64:]
            assert rest == REST
            # A swap counts from before its answer has come.
            assert digest in live[answer.begun : answer.ended + 2], "not live meanwhile"
        assert len({answer.text for answer in answers}) > (SWAPS // 2 if how == "upload" else 1)

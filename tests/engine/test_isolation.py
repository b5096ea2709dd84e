"""The prefix cache of the real engine: what one customer asked makes nothing faster for another."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.engine.reference import Reference, Spec
from tests.support.site import Site

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

LONG = " ".join(f"Line {i} of a contract that two customers happen to share." for i in range(40))


async def cached(site: Site, tenant: str) -> int:
    rows = (await site.admin.get(f"/admin/v1/usage?tenant={tenant}")).json()["data"]
    return int(rows[0]["cached_tokens"])


@pytest.mark.parametrize("model", ["shared-name", None])
async def test_a_prefix_is_cached_for_its_customer_only(
    site: Site, reference: Reference, tmp_path: Path, model: str | None
) -> None:
    """With the same bytes under the same name, and on the base model."""
    asked = model or site.services.engine.base.name
    spec = Spec(seed=91, rank=8, targets=("q_proj", "v_proj"))
    folder = await asyncio.to_thread(reference.make, spec, tmp_path / "a")
    keys = {}
    for name in (f"first-{bool(model)}".lower(), f"second-{bool(model)}".lower()):
        keys[name] = await site.tenant(name, {"shared-name": folder})
    first, second = keys
    for name, expected in ((first, False), (second, False), (first, True)):
        before = await cached(site, name) if expected else 0
        answer = await site.chat(keys[name], LONG, model=asked, max_tokens=2, temperature=0)
        assert answer.status_code == 200, answer.text
        assert (await cached(site, name) > before) is expected, name

"""The bad requests on the real engine, which parses, tokenizes and compiles what the fake does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.reference import ATTENTION, Reference, Spec
from tests.support.bad_requests import BAD, ask_all
from tests.support.site import Site

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


async def test_each_has_its_status_and_code_and_breaks_nothing(
    site: Site, reference: Reference, tmp_path: Path
) -> None:
    reference.make(Spec(seed=950, rank=8, targets=ATTENTION), tmp_path)
    key = await site.tenant("wrongdoer", {"a": tmp_path})
    await ask_all(site, key, tokens=60, bads=BAD)
    assert (await site.http.get("/ready")).status_code == 200

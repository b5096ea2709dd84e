"""Behind a real nginx with its defaults, on the real engine: how long the first token takes.

``FIRST_TOKENS=20`` runs it, on a machine that does nothing else.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import pytest

from tests.engine.reference import ATTENTION, Reference, Spec
from tests.service.http.test_nginx import behind_nginx, first_token
from tests.support.nginx import NGINX
from tests.support.site import Site

STREAMS = int(os.environ.get("FIRST_TOKENS", "0"))
pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(not STREAMS or not Path(NGINX).exists(), reason="takes FIRST_TOKENS=20, and nginx"),
]


async def test_the_first_token_comes_as_soon_as_without_it(
    site: Site, reference: Reference, tmp_path: Path
) -> None:
    reference.make(Spec(seed=11, rank=8, targets=ATTENTION), tmp_path / "a")
    key = await site.tenant("proxied", {"a": tmp_path / "a"})
    async with behind_nginx(site, tmp_path) as proxied:
        for client in (site.http, proxied):
            await first_token(client, key)
        times: dict[str, list[float]] = {"directly": [], "through nginx": []}
        for _ in range(STREAMS):  # in turns: a machine that gets slower favours neither
            times["directly"].append(await first_token(site.http, key))
            times["through nginx"].append(await first_token(proxied, key))
    found = {how: statistics.median(taken) for how, taken in times.items()}
    print(", ".join(f"{how} {seconds:.3f} s" for how, seconds in found.items()))
    assert found["through nginx"] - found["directly"] < 0.3

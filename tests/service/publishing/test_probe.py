"""The probe between commit and link: what it lets through, what it refuses, and what is left of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from adapters.inspection.logprobs import NEGLIGIBLE, Difference, compare, finite
from adapters.model import WEIGHTS_FILE
from server.publishing import probe
from server.publishing.publish import publish
from tests.service.http.test_api import engine_of, error
from tests.service.publishing.test_upload import URL, blobs, files, nothing_kept
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.site import Site
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

ALLOWED = f"{URL}?allow_no_effect=true"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path, FakeEngine(tiny.base(), times=Times(step=0.001))) as site:
        await site.admin.post("/admin/v1/tenants", json={"id": "acme"})
        yield site


def changed(change: Callable[[str, Any], Any], seed: int = 1) -> dict[str, bytes]:
    tensors = load_file(tiny.adapter(seed) / WEIGHTS_FILE)
    return {**files(seed), WEIGHTS_FILE: save({name: change(name, t) for name, t in tensors.items()})}


def times(factor: float) -> dict[str, bytes]:
    return changed(lambda name, tensor: tensor * np.float32(factor) if "lora_B" in name else tensor)


async def settled(site: Site) -> None:
    async with asyncio.timeout(60):
        while site.services.tasks:
            await asyncio.sleep(0.005)


async def nothing_left(site: Site, folder: Path) -> None:
    """Neither a row nor a blob, nor anything in the engine."""
    await settled(site)
    await nothing_kept(site, folder)
    assert site.services.publishing.coming == []
    async with asyncio.timeout(60):
        while (await engine_of(site).report()).host:
            await asyncio.sleep(0.01)


async def test_the_report_says_what_the_adapter_changes(site: Site) -> None:
    made = await site.admin.post(URL, files=files())
    found = made.json()["report"]["probe"]
    assert found["effect"] is True
    assert found["no_effect_allowed"] is False
    assert found["log_prob"] > 0.01
    assert found["kl"] > 0.001
    assert found["noise"] == {"log_prob": 0.0, "kl": 0.0}
    assert (found["base"], found["dtype"], found["engine"]) == (None, "float32", "fake 1")
    (shown,) = (await site.admin.get("/admin/v1/tenants/acme/adapters/a")).json()["versions"]
    assert shown["report"]["probe"] == found
    assert shown["tier"] == "gpu", "it need not be loaded again"
    weaker = (await site.admin.post(URL, files=times(0.1))).json()["report"]["probe"]
    assert NEGLIGIBLE < weaker["log_prob"] < found["log_prob"]
    assert weaker["kl"] < found["kl"]


@pytest.mark.parametrize(("places", "at_once"), [(4, 1), (8, 2), (12, 3), (16, 4), (64, 4)])
async def test_prompts_are_answered_at_once_in_a_quarter_of_the_places(
    tmp_path: Path, places: int, at_once: int
) -> None:
    """And come out as one after the other."""
    found = []
    for number, (most, together) in enumerate([(1, 1), (places, at_once)]):
        engine = FakeEngine(tiny.base(), max_running=most)
        async with fake_site(tmp_path / str(number), engine) as site:
            await site.admin.post("/admin/v1/tenants", json={"id": "acme"})
            found.append((await site.admin.post(URL, files=files())).json()["report"]["probe"])
        assert len(engine.calls) == 3 * math.ceil(4 / together)
        assert engine.most_running == together
    assert found[0] == found[1]


async def test_what_the_engine_cannot_tell_from_the_base_is_refused(site: Site, tmp_path: Path) -> None:
    said = error(await site.admin.post(URL, files=times(1e-12)), 422, "adapter_no_effect")
    assert "no log-probability changes" in said["message"]
    assert "float32" in said["message"]
    assert "e-1" in said["message"], "the norm"
    assert "allow_no_effect=true" in said["message"]
    await nothing_left(site, tmp_path)


@pytest.mark.parametrize("factor", [0.0, 1e-12])
async def test_who_wants_one_without_effect_gets_it(site: Site, tmp_path: Path, factor: float) -> None:
    for url in (URL, f"{URL}?allow_no_effect=false"):
        refused = await site.admin.post(url, files=times(factor))
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "adapter_no_effect")
    made = await site.admin.post(ALLOWED, files=times(factor))
    assert made.status_code == 201, made.text
    found = made.json()["report"]["probe"]
    assert (found["effect"], found["no_effect_allowed"]) == (False, True)
    assert (await site.admin.post(URL, files=times(factor))).status_code == 422
    assert len(blobs(tmp_path)) == 1, "another's refusal does not take the bytes away"
    invalid = await site.admin.post(f"{URL}?allow_no_effect=perhaps", files=times(factor))
    assert invalid.status_code == 422
    assert invalid.json()["error"]["param"] == "query.allow_no_effect"


async def test_answers_that_are_not_numbers_are_refused(site: Site, tmp_path: Path) -> None:
    large = changed(lambda name, tensor: tensor * np.float32(1e30))
    error(await site.admin.post(ALLOWED, files=large), 422, "adapter_implausible", WEIGHTS_FILE)
    url = f"{ALLOWED}&allow_implausible=true"
    said = error(await site.admin.post(url, files=large), 422, "weights_not_finite")
    assert "not numbers" in said["message"]
    await nothing_left(site, tmp_path)


async def test_the_same_bytes_are_probed_once(site: Site) -> None:
    first = (await site.admin.post(URL, files=files())).json()
    calls = len(engine_of(site).calls)
    second = (await site.admin.post(URL.replace("/a/", "/b/"), files=files())).json()
    assert len(engine_of(site).calls) == calls
    assert second["report"] == first["report"]
    await site.admin.post(URL, files=files(2))
    assert len(engine_of(site).calls) > calls


@pytest.mark.parametrize(
    "changes", [{}, {"lora_dtype": "bfloat16"}, {"version": "fake 2"}, {"base": "other"}]
)
async def test_a_probe_of_another_base_or_engine_does_not_count(
    tmp_path: Path, changes: dict[str, str]
) -> None:
    for round_ in range(2):
        engine = FakeEngine(tiny.base())
        for name, value in changes.items() if round_ else ():
            changed_base = replace(tiny.base(), fingerprint=value)
            setattr(engine, name, changed_base if name == "base" else value)
        async with fake_site(tmp_path, engine) as site:
            await site.admin.post("/admin/v1/tenants", json={"id": "acme"})
            made = (await site.admin.post(URL, files=files())).json()
        found = made["report"]["probe"]
        assert (found["base"], found["dtype"], found["engine"]) == (
            engine.base.fingerprint,
            engine.lora_dtype,
            engine.version,
        )
        assert bool(engine.calls) is (bool(changes) or not round_)


@pytest.mark.parametrize("verb", ["stage", "activate"])
async def test_an_adapter_that_cannot_be_loaded_is_not_kept(site: Site, tmp_path: Path, verb: str) -> None:
    digest = (await site.admin.post(URL, files=files())).json()["digest"]
    await site.admin.delete("/admin/v1/tenants/acme/adapters/a")
    await nothing_left(site, tmp_path)
    engine_of(site).fail(verb, f"acme/a@{digest}")
    refused = await site.admin.post(URL, files=files())
    said = error(refused, 503, "adapter_unavailable")
    assert "could not be loaded" in said["message"], "that, and not that there was no room"
    assert int(refused.headers["Retry-After"]) >= 1
    await nothing_left(site, tmp_path)
    assert (await site.admin.post(URL, files=files())).status_code == 201


async def test_a_probe_waits_only_so_long(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "TIMEOUT", 0.2)
    engine_of(site).times.stage = 5.0
    refused = await site.admin.post(URL, files=files())
    assert "no room" in error(refused, 503, "adapter_unavailable")["message"]
    assert int(refused.headers["Retry-After"]) >= 1
    await nothing_left(site, tmp_path)


async def test_a_probe_that_runs_too_long_ends_in_the_engine(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await site.admin.post(URL.replace("/a/", "/first/"), files=files(2))
    await site.admin.delete("/admin/v1/tenants/acme/adapters/first")
    monkeypatch.setattr(probe, "TIMEOUT", 0.2)
    engine_of(site).times.step = 5.0
    error(await site.admin.post(URL, files=files()), 503, "adapter_unavailable")
    assert engine_of(site).running == []
    await nothing_left(site, tmp_path)


async def test_an_engine_that_dies_meanwhile(tmp_path: Path) -> None:
    engine = FakeEngine(tiny.base(), times=Times(step=0.2))
    async with fake_site(tmp_path, engine, engine_restarts=0) as site:
        await site.admin.post("/admin/v1/tenants", json={"id": "acme"})
        uploading = asyncio.create_task(site.admin.post(URL, files=files()))
        while not engine.running:
            await asyncio.sleep(0.01)
        engine.die()
        error(await uploading, 503, "engine_stopped")
        await nothing_kept(site, tmp_path)


async def test_no_customer_waits_for_a_probe(site: Site) -> None:
    """One that cannot get a slot: both are held by streams that go on."""
    key = await site.tenant("zeta", {"x": tiny.adapter(2), "y": tiny.adapter(3)})
    engine_of(site).times.step = 0.02
    asking = [
        asyncio.create_task(site.chat(key, "hi", model=model, max_tokens=60)) for model in ("x", "y") * 2
    ]
    uploaded = await site.admin.post(URL, files=files())
    assert uploaded.status_code == 201, uploaded.text
    answers = await asyncio.gather(*asking)
    assert [answer.status_code for answer in answers] == [200] * 4
    assert all(answer.json()["usage"]["completion_tokens"] == 60 for answer in answers)


async def test_bytes_being_probed_are_not_removed_with_a_deleted_version(site: Site, tmp_path: Path) -> None:
    digest = (await site.admin.post(URL, files=files())).json()["digest"]
    publishing = site.services.publishing
    publishing.catalog.probe_of = nothing_known  # or it would not be probed again
    go_on, probe_them = asyncio.Event(), publishing.prober.probe

    async def held(*args: object) -> object:
        await go_on.wait()
        return await probe_them(*args)

    publishing.prober.probe = held
    again = asyncio.create_task(site.admin.post(URL.replace("/a/", "/b/"), files=files()))
    async with asyncio.timeout(60):
        while not publishing.coming:
            await asyncio.sleep(0.005)
    assert (await site.admin.delete("/admin/v1/tenants/acme/adapters/a")).status_code == 204
    await settled(site)
    assert publishing.coming == [digest], "the probe outlasts the removal"
    assert (tmp_path / "blobs" / digest / WEIGHTS_FILE).exists()
    go_on.set()
    assert (await again).status_code == 201
    assert blobs(tmp_path) == [digest]


async def test_an_upload_that_is_cancelled_anywhere_is_whole_or_leaves_nothing(
    site: Site, tmp_path: Path
) -> None:
    service, engine = site.services.publishing, engine_of(site)
    engine.times.stage = 0.01

    async def pieces(seed: int) -> AsyncIterator[tuple[str, bytes]]:
        for name, content in files(seed).items():
            yield name, content

    seen: set[bool] = set()
    for seed in range(160):
        if seed >= 60 and len(seen) == 2:
            break
        # An adapter of its own each time, or a probe would be remembered.
        uploading = asyncio.create_task(publish(service, "acme", f"a{seed}", pieces(seed), key=str(seed)))
        # On a machine that is busy it takes longer to its end.
        await asyncio.wait([uploading], timeout=0.002 * seed * 1.1 ** max(0, seed - 60))
        uploading.cancel()
        await asyncio.wait([uploading])
        linked = await service.catalog.linked_digests()
        seen.add(uploading.cancelled())
        assert blobs(tmp_path) == sorted(linked)
        assert len(linked) >= (not uploading.cancelled())
        assert service.coming == []
        assert engine.running == []
        assert site.services.dispatcher.open_leases() == []
    assert seen == {True, False}


async def nothing_known(_: str) -> None:
    return None


async def test_of_two_uploads_of_bytes_that_fail_the_last_takes_them_along(
    site: Site, tmp_path: Path
) -> None:
    both = await asyncio.gather(*(site.admin.post(URL, files=times(1e-12)) for _ in range(2)))
    for refused in both:
        error(refused, 422, "adapter_no_effect")
    await nothing_left(site, tmp_path)


async def test_a_probe_is_counted_but_nobodys(site: Site) -> None:
    await site.admin.post(URL, files=files())
    metrics = (await site.http.get("/metrics")).text
    assert 'loraplex_requests_total{outcome="completed",tenant="_server"} 3.0' in metrics
    assert (await site.admin.post("/admin/v1/tenants", json={"id": probe.TENANT})).status_code == 422


# --- the numbers --------------------------------------------------------------------------------------


def scores(*positions: dict[str, float]) -> list[list[dict[str, float]]]:
    return [[{token: math.log(p) for token, p in position.items()} for position in positions]]


def test_the_same_differ_by_nothing() -> None:
    one = scores({"a": 0.5, "b": 0.25}, {"a": 1.0})
    assert compare(one, one) == Difference(0.0, 0.0)
    assert not compare(one, one).exceeds(Difference(0.0, 0.0))


def test_the_numbers_of_a_change() -> None:
    found = compare(scores({"a": 0.5, "b": 0.5}), scores({"a": 0.25, "b": 0.75}))
    assert found.log_prob == pytest.approx(math.log(2))
    assert found.kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))
    mean = compare(scores({"a": 0.5}, {"a": 0.5}), scores({"a": 0.25}, {"a": 0.5}))
    assert mean.kl == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)) / 2)


def test_what_one_of_them_does_not_name_is_the_rest() -> None:
    found = compare(scores({"a": 0.6, "b": 0.4}), scores({"a": 0.3, "c": 0.7}))
    assert found.log_prob == pytest.approx(math.log(2))
    assert found.kl == pytest.approx(0.6 * math.log(2) + 0.4 * math.log(0.4 / 0.7))
    apart = compare(scores({"a": 1.0}), scores({"b": 1.0}))
    assert (apart.log_prob, apart.kl) == (0.0, 0.0), "nothing can be said"


def test_what_is_no_number_stays_visible() -> None:
    one = scores({"a": 0.5, "b": 0.5})
    for broken in (math.nan, math.inf, -math.inf):
        assert not finite([[{"a": broken, "b": -0.1}]])
    assert finite(one)
    assert math.isnan(compare(one, [[{"a": math.nan, "b": -0.7}]]).log_prob)
    assert math.isnan(compare(one, [[{"a": math.nan, "b": -0.7}]]).kl)


def test_a_change_must_exceed_the_noise_in_one_of_its_numbers() -> None:
    noise = Difference(0.1, 0.01)
    assert not Difference(0.3, 0.03).exceeds(noise)
    assert Difference(0.31, 0.0).exceeds(noise)
    assert Difference(0.0, 0.031).exceeds(noise)
    assert not Difference(NEGLIGIBLE, NEGLIGIBLE).exceeds(Difference(0.0, 0.0))

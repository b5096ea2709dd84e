"""Golden probes: read strictly, held against the engine before a version goes live, and again on demand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import AdapterRejected
from adapters.inspection.golden import MAX_BYTES, MAX_TOKENS, Golden, GoldenProbe, parse
from adapters.model import PROBES_FILE
from server.cli import offline
from tests.service.http.test_api import engine_of, error
from tests.service.publishing.test_upload import URL, blobs, files, nothing_kept
from tests.support import tiny
from tests.support.fakes import FakeEngine, log_probs, push_of
from tests.support.site import Site
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

VERIFY = "/admin/v1/tenants/acme/adapters/a/verify"
TEXT, IDS = "the sky is blue", [3, 1, 4, 1, 5]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path) as site:
        await site.admin.post("/admin/v1/tenants", json={"id": "acme"})
        yield site


async def trained(site: Site, seed: int = 1, tolerance: float = 0.01) -> dict[str, Any]:
    """What the fake says with this adapter, as the training side would have it."""
    made = await site.admin.post(URL.replace("/a/", "/scratch/"), files=files(seed))
    digest = made.json()["digest"]
    push = push_of(tiny.adapter(seed))
    probes = []
    for prompt, ids in ((TEXT, range(5)), (IDS, IDS)):
        text = prompt if isinstance(prompt, str) else " ".join(map(str, prompt))
        said = [log_probs(text, at, push, digest)[token] for at, token in enumerate(ids)]
        probes.append({"prompt": prompt, "log_probs": said[1:]})
    return {"tolerance": tolerance, "probes": probes}


async def upload(site: Site, golden: Any, seed: int = 1, url: str = URL) -> Any:
    content = golden if isinstance(golden, bytes) else json.dumps(golden).encode()
    return await site.admin.post(url, files={**files(seed), PROBES_FILE: content})


async def test_probes_that_agree_are_reported_and_kept(site: Site, tmp_path: Path) -> None:
    golden = await trained(site)
    made = await upload(site, golden)
    assert made.status_code == 201, made.text
    report = made.json()["report"]["golden"]
    assert (report["matches"], report["prompts"], report["tolerance"]) == (True, 2, 0.01)
    assert 0 <= report["largest_difference"] < 1e-9
    assert blobs(tmp_path) == [made.json()["digest"]], "the same bytes with and without probes are one blob"
    stored = tmp_path / "blobs" / made.json()["digest"]
    assert {path.name for path in stored.iterdir()} == set(files())
    verified = await site.admin.post(VERIFY)
    assert verified.status_code == 200, verified.text
    assert verified.json() == {"adapter": "a", "version": 1, **report}
    (shown,) = (await site.admin.get(VERIFY.removesuffix("/verify"))).json()["versions"]
    assert shown["report"]["golden"] == report
    assert "log_probs" not in json.dumps(shown)


async def test_probes_that_disagree_keep_the_upload_out(site: Site, tmp_path: Path) -> None:
    golden = await trained(site)
    golden["probes"][1]["log_probs"][2] -= 0.5
    before = blobs(tmp_path)
    refused = error(await upload(site, golden), 422, "probe_mismatch", PROBES_FILE)
    assert "token 3 of prompt 1, [3, 1, 4, 1, 5]," in refused["message"]
    assert "differ by 0.5" in refused["message"]
    assert blobs(tmp_path) == before
    error(await site.admin.get(VERIFY.removesuffix("/verify")), 404, "adapter_not_found")
    golden["tolerance"] = 0.6
    made = await upload(site, golden)
    assert made.json()["report"]["golden"]["largest_difference"] == pytest.approx(0.5)
    assert made.json()["report"]["golden"]["worst_prompt"] == 1


async def test_another_adapter_than_the_one_probed_is_found_out(site: Site, tmp_path: Path) -> None:
    golden = await trained(site, seed=1)
    await site.admin.delete("/admin/v1/tenants/acme/adapters/scratch")
    error(await upload(site, golden, seed=2), 422, "probe_mismatch", PROBES_FILE)
    while site.services.tasks:
        await next(iter(site.services.tasks))
    await nothing_kept(site, tmp_path)


async def test_an_engine_that_has_changed_is_found_out_on_demand(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    await upload(site, await trained(site))
    await upload(site, await trained(site, seed=2), seed=2)
    assert (await site.admin.post(VERIFY)).json()["version"] == 2
    monkeypatch.setattr("tests.support.fakes.push_of", lambda folder: 2 * push_of(folder))
    for number in (1, 2):
        found = (await site.admin.post(f"{VERIFY}?version={number}")).json()
        assert (found["version"], found["matches"]) == (number, False)
        assert found["largest_difference"] > found["tolerance"]
    assert (await site.admin.get(VERIFY.removesuffix("/verify"))).json()["live"] == 2, "it only looks"


async def test_an_engine_with_exact_kernels_is_held_to_its_own_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Far within the tolerance of the training side, one bit is too many; another device may have others."""
    push = push_of

    async def after(device: str | None, change: float = 1.0) -> dict[str, Any]:
        """What a server that starts on ``device`` says, once it has looked by itself where it has to."""
        monkeypatch.setattr("tests.support.fakes.push_of", lambda folder: change * push(folder))
        engine = FakeEngine(tiny.base())
        engine.exact_on = device
        async with fake_site(tmp_path, engine) as site:
            await asyncio.gather(*site.services.tasks)
            said: dict[str, Any] = (await site.admin.post(VERIFY)).json()
            return said

    async with fake_site(tmp_path) as site:
        await site.admin.post("/admin/v1/tenants", json={"id": "acme"})
        assert "bits" not in (await upload(site, await trained(site))).json()["report"]["golden"]
    first = await after("H100 x 1")
    assert (first["matches"], first["identical"]) == (True, True), "the start has kept what is held against"
    moved = await after("H100 x 1", change=1 + 1e-12)
    assert 0 < moved["largest_difference"] < 1e-9 < moved["tolerance"]
    assert (moved["matches"], moved["identical"], moved["bits"]) == (False, False, first["bits"])
    assert (await after("H100 x 1"))["identical"], "and again as before"
    other = await after("H200 x 1", change=1 + 1e-12)
    assert (other["matches"], other["identical"]) == (True, True)
    assert other["bits"] != first["bits"]
    assert "bits" not in await after(None)


async def test_after_an_upgrade_the_server_looks_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shown = VERIFY.removesuffix("/verify")

    async def after(version: str) -> tuple[dict[str, Any], str]:
        """The report of the live version once all is verified, and the metrics."""
        engine = FakeEngine(tiny.base())
        engine.version = version
        async with fake_site(tmp_path, engine) as site:
            await asyncio.gather(*site.services.tasks)
            *_, live = (await site.admin.get(shown)).json()["versions"]
            return live["report"]["golden"], (await site.http.get("/metrics")).text

    async with fake_site(tmp_path) as site:
        await site.admin.post("/admin/v1/tenants", json={"id": "acme"})
        await upload(site, await trained(site, seed=2), seed=2)
        await upload(site, await trained(site))
    report, metrics = await after("fake 1")
    assert (report["matches"], report["engine"]) == (True, "fake 1")
    assert 'loraplex_verified_versions_total{result="matches"} 0.0' in metrics, "nothing has changed"
    report, metrics = await after("fake 2")
    assert (report["matches"], report["engine"]) == (True, "fake 2")
    assert 'loraplex_verified_versions_total{result="matches"} 1.0' in metrics, "the live version alone"
    monkeypatch.setattr("tests.support.fakes.push_of", lambda folder: 2 * push_of(folder))
    report, metrics = await after("fake 3")
    assert (report["matches"], report["engine"]) == (False, "fake 3")
    assert 'result="differs"} 1.0' in metrics
    assert "acme/a@2 differs from its probes.json by" in caplog.text


async def test_there_must_be_something_to_verify(site: Site) -> None:
    await site.admin.post(URL, files=files())
    said = error(await site.admin.post(VERIFY), 404, "probes_not_found")
    assert "probes.json" in said["message"]
    error(await site.admin.post(f"{VERIFY}?version=2"), 404, "version_not_found")
    error(await site.admin.post(VERIFY.replace("/a/", "/b/")), 404, "adapter_not_found")
    await upload(site, await trained(site, seed=2), seed=2)
    assert (await site.admin.post(VERIFY)).json()["matches"] is True
    error(await site.admin.post(f"{VERIFY}?version=1"), 404, "probes_not_found")


async def test_a_text_that_is_read_as_other_tokens(site: Site) -> None:
    golden = await trained(site)
    golden["probes"][0]["log_probs"].pop()
    said = error(await upload(site, golden), 422, "probe_mismatch", PROBES_FILE)
    assert "as 5 tokens" in said["message"]
    assert "of 4" in said["message"]


@pytest.mark.parametrize("prompt", [[3, 1, 99], "word " * 600])
async def test_a_prompt_that_the_engine_refuses(site: Site, prompt: Any) -> None:
    golden = await trained(site)
    count = len(prompt) - 1 if isinstance(prompt, list) else 600
    golden["probes"][1] = {"prompt": prompt, "log_probs": [-1.0] * count}
    said = error(await upload(site, golden), 422, "probes_invalid")
    assert "refuses prompt 1" in said["message"]


async def test_probes_are_a_part_of_what_a_key_stands_for(site: Site) -> None:
    golden = await trained(site)
    key = {"Idempotency-Key": "one"}
    content = {**files(), PROBES_FILE: json.dumps(golden).encode()}
    assert (await site.admin.post(URL, files=content, headers=key)).status_code == 201
    error(
        await site.admin.post(URL, files=files(), headers=key), 409, "idempotency_conflict", "Idempotency-Key"
    )


async def test_a_file_that_cannot_be_read_is_refused_before_the_engine_is_asked(
    site: Site, tmp_path: Path
) -> None:
    for content in (b"{", b"x" * (MAX_BYTES + 1)):
        error(await upload(site, content), 422, "probes_invalid", PROBES_FILE)
    assert engine_of(site).calls == []
    await nothing_kept(site, tmp_path)


PROBE: dict[str, Any] = {"prompt": [1, 2], "log_probs": [-1.0]}


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"probes": []},
        {"probes": [PROBE] * 65},
        {"probes": [PROBE], "tolerance": 0},
        {"probes": [PROBE], "tolerance": 11},
        {"probes": [PROBE], "tolerance": "0.1"},
        {"probes": [PROBE], "more": 1},
        {"probes": [{**PROBE, "more": 1}]},
        {"probes": [{**PROBE, "prompt": ""}]},
        {"probes": [{**PROBE, "prompt": 1}]},
        {"probes": [{**PROBE, "prompt": [1]}]},
        {"probes": [{**PROBE, "prompt": [1, -2]}]},
        {"probes": [{**PROBE, "prompt": [1, 2.5]}]},
        {"probes": [{**PROBE, "prompt": [1, True]}]},
        {"probes": [{**PROBE, "log_probs": []}]},
        {"probes": [{**PROBE, "log_probs": [0.5]}]},
        {"probes": [{**PROBE, "log_probs": ["-1"]}]},
        {"probes": [{"prompt": [1] * (MAX_TOKENS + 1), "log_probs": [-1.0] * MAX_TOKENS}]},
        b'{"probes": [{"prompt": [1, 2], "log_probs": [NaN]}]}',
        b'{"probes": [{"prompt": [1, 2], "log_probs": [-1e999]}]}',
        b'{"probes": [], "probes": []}',
        b"[" * 100_000,
        b"\xff",
    ],
    ids=lambda content: str(content)[:40],
)
def test_files_that_are_refused(content: Any) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(AdapterRejected) as refused:
        parse(data)
    assert (refused.value.code, refused.value.param) == ("probes_invalid", PROBES_FILE)
    assert "loraplex probes make" in refused.value.message
    assert len(refused.value.message) < 500


def test_what_is_written_is_what_is_read() -> None:
    golden = Golden(tolerance=0.05, probes=[GoldenProbe(prompt=[1, 2], log_probs=[-1.5], text="a b")])
    assert parse(golden.model_dump_json().encode()) == golden
    assert Golden.model_validate(json.loads(json.dumps(golden.model_dump()))) == golden


def test_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / PROBES_FILE
    made = offline.make_probes(tmp_path, tmp_path, out, prompts=[], tolerance=0.1)
    assert made == offline.FAILED
    assert "no config.json" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()

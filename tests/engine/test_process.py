"""The server as a process: first start, SIGTERM in the middle of a stream, restart, death of the engine."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file, save

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from tests.engine.processes import Running, gone, server
from tests.engine.reference import ATTENTION, Reference, Spec
from tests.support.site import bearer

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

SETTINGS = {"ENGINE_RESTARTS": "0", "ENGINE_ARGS": '{"max_num_seqs": 4}', "DRAIN_TIMEOUT": "600"}
OLD, NEW = "a-metrics-key-of-the-tests", "another-metrics-key-of-the-tests"
BODY = {"messages": [{"role": "user", "content": "Count to a hundred."}], "temperature": 0}


async def test_the_life_of_a_server(whole_base_dir: Path, whole_reference: Reference, tmp_path: Path) -> None:
    spec = Spec(seed=5, rank=8, targets=ATTENTION)
    folder = await asyncio.to_thread(whole_reference.make, spec, tmp_path / "a")
    data = tmp_path / "data"
    data.mkdir()
    # As an operator starts it: its processes import what they need by themselves.
    async with server(whole_base_dir, data, forked="nothing", **SETTINGS) as first:
        key = await _set_up(first, folder)
        before = (
            await first.http.post(
                "/v1/chat/completions", json={**BODY, "max_tokens": 16}, headers=bearer(key)
            )
        ).json()
        family = first.family()
        await _drains(first, key)
        assert await first.exit_status() == 0
        assert not await gone(family, 240), "the engine's processes outlived the server"

    rotated = tmp_path / "metrics_key"
    rotated.write_text(OLD)
    async with server(whole_base_dir, data, **SETTINGS, METRICS_KEY_FILE=str(rotated)) as second:
        assert second.log.read_text().count("Admin key") == 1, "the key is shown once, not at every start"
        after = await second.http.post(
            "/v1/chat/completions", json={**BODY, "max_tokens": 16}, headers=bearer(key)
        )
        assert after.json()["choices"] == before["choices"]
        await _reads_again(second, key, rotated)
        second.core().kill()
        assert await second.exit_status() == 1
    text = (data / "server.log").read_text()
    assert "Count to a hundred" not in text
    assert key not in text


async def _set_up(running: Running, folder: Path) -> str:
    api, auth = running.http, running.admin
    assert (await api.post("/admin/v1/tenants", json={"id": "acme"}, headers=auth)).status_code == 201
    files = {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    url = "/admin/v1/tenants/acme/adapters/counter/versions"
    tensors = {n: t * 1e-12 if "lora_B" in n else t for n, t in load_file(folder / WEIGHTS_FILE).items()}
    faint = await api.post(url, files={**files, WEIGHTS_FILE: save(tensors)}, headers=auth)
    assert (faint.status_code, faint.json()["error"]["code"]) == (422, "adapter_no_effect"), faint.text
    assert "bfloat16" in faint.json()["error"]["message"]
    made = await api.post(url, files=files, headers=auth)
    assert made.status_code == 201, made.text
    assert made.json()["report"]["probe"]["log_prob"] > 0.1
    return str((await api.post("/admin/v1/tenants/acme/keys", json={}, headers=auth)).json()["key"])


async def _reads_again(running: Running, key: str, rotated: Path) -> None:
    """SIGHUP while a stream runs: a secret's file is read again, and the stream goes to its end."""

    async def allowed(metrics_key: str) -> bool:
        return (await running.http.get("/metrics", headers=bearer(metrics_key))).status_code == 200

    body = {**BODY, "max_tokens": 60, "stream": True, "logit_bias": {"2": -100}}
    async with running.http.stream("POST", "/v1/chat/completions", json=body, headers=bearer(key)) as stream:
        assert stream.status_code == 200
        lines = stream.aiter_lines()
        await anext(lines)
        assert (await allowed(OLD), await allowed(NEW)) == (True, False)
        rotated.write_text(NEW)
        running.process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(240):
            while not await allowed(NEW):
                await asyncio.sleep(0.05)
        assert not await allowed(OLD)
        assert [line async for line in lines if line][-1] == "data: [DONE]"
    said = running.log.read_text()
    assert "taken over: METRICS_KEY" in said
    assert NEW not in said


async def _drains(running: Running, key: str) -> None:
    """SIGTERM while a stream runs: not ready at once, nothing new, and the stream goes to its end."""
    body = {**BODY, "max_tokens": 120, "stream": True, "logit_bias": {"2": -100}}
    async with running.http.stream("POST", "/v1/chat/completions", json=body, headers=bearer(key)) as stream:
        lines = stream.aiter_lines()
        await anext(lines)
        running.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(240):
            while (await running.http.get("/ready")).status_code == 200:
                await asyncio.sleep(0.01)
        refused = await running.http.post("/v1/chat/completions", json=BODY, headers=bearer(key))
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert int(refused.headers["Retry-After"]) >= 1
        rest = [line async for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2].replace(" ", "")

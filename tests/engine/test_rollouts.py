"""Rollouts on the real engine at 5 requests a second: an equal version goes live, bad ones go back.

So do those whose replayed prompts say it. What a SIGKILL does in the middle is in ``test_rollout_kills``.
"""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from tests.engine.reference import ATTENTION, Reference, Spec
from tests.support.site import Site, bearer

TOKENS = 8  # of a replayed answer
IN_FLIGHT = 4  # requests that wait for their answers
pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(1500)]

ADAPTER = "/admin/v1/tenants/rollers/adapters/a"
# Certain after some dozens of requests. None by time: a busy machine would decide.
GUARDS: dict[str, Any] = {
    "errors": 0.3, "refusals": 0.3, "finish": 0.4, "first_token": None, "tokens_per_second": None,
    "length": 1.5, "min_samples": 5, "error_rate": 0.25,
}  # fmt: skip
GENTLE = "{% for m in messages %}{% if 'seven' in m.content %}{{ raise_exception('not seven') }}{% endif %}"
GENTLE += "{{ m.content }}{% endfor %}"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def key(site: Site, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Version 1 is live, 2 has the same files, 3 answers as the base, 4 fails on some prompts."""
    folder = tmp_path_factory.mktemp("rollers")
    reference.make(Spec(seed=991, rank=8, targets=ATTENTION), folder)
    key = await site.tenant("rollers", {"a": folder}, sample_prompts=True)
    site.services.judge.replayer.sampler._every = 0.3
    await site.upload("rollers", "a", folder)
    await upload(site, files_of(folder) | {WEIGHTS_FILE: nothing_of(folder)}, allow_no_effect=True)
    await upload(site, files_of(folder) | {"chat_template.jinja": GENTLE.encode()})
    return key


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}


def nothing_of(folder: Path) -> bytes:
    """The weights of an adapter that does nothing."""
    weights = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    save_file(weights, folder / "nothing")
    return (folder / "nothing").read_bytes()


async def upload(site: Site, files: dict[str, bytes], **query: Any) -> None:
    made = await site.admin.post(f"{ADAPTER}/versions", params=query, files=files)
    assert made.status_code == 201, made.text


async def rolled_out(site: Site, key: str, version: int, guards: dict[str, Any]) -> dict[str, Any]:
    """The rollout of ``version`` when it has ended, under 5 requests a second where the engine keeps up."""
    await site.admin.patch(ADAPTER, json={"live": 1})
    body = {"version": version, "steps": [50, 100], "hold": 2, "guards": guards}
    made = await site.admin.post(f"{ADAPTER}/rollouts", json=body)
    assert made.status_code == 201, made.text

    async def ask(number: int) -> None:
        text = "Is seven odd? Say yes or no." if number % 2 else "Is it day? Say yes or no."
        turns = [{"role": "user", "content": text}]
        asked = {"model": "a", "messages": turns, "max_tokens": 6, "temperature": 0}
        await site.http.post("/v1/chat/completions", json=asked, headers=bearer(key))

    asking: set[asyncio.Task[None]] = set()
    async with asyncio.timeout(600):
        for number in itertools.count():
            if len(asking) < IN_FLIGHT:  # on a busy machine fewer than 5 a second
                asking.add(task := asyncio.create_task(ask(number)))
                task.add_done_callback(asking.discard)
            await asyncio.sleep(0.2)
            if number % 5 == 0:
                found = (await site.admin.get(f"{ADAPTER}/rollouts/{made.json()['id']}")).json()
                if found["state"] in ("completed", "rolled_back"):
                    break
        await asyncio.gather(*asking)
    numbers = found["numbers"] or {"new": {"requests": 0}, "replays": None}
    asked, replays = numbers["new"]["requests"], (numbers["replays"] or {}).get("prompts", 0)
    taken = f"{asked} requests of version {version}, {replays} replays"
    print(f"{found['state']} after {taken}: {found['reason']}")
    return dict(found)


async def test_an_equal_version_goes_live(site: Site, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replayed prompts have the same answers, token by token and number by number."""
    monkeypatch.setattr("server.rollouts.replay.ANSWER_TOKENS", TOKENS)
    ended = await rolled_out(site, key, 2, GUARDS | {"drift": 0.01, "divergence": 0.01, "changed": 0.5})
    assert ended["state"] == "completed", ended
    replays = ended["numbers"]["replays"]
    assert (replays["failed"], replays["changed"]) == (0, 0.0), replays
    assert replays["prompts"] >= 4, "as many as its error rate needs"
    assert replays["largest_drift"] < 1e-3
    assert replays["divergence"] < 1e-3
    assert (await site.admin.get(ADAPTER)).json()["live"] == 2


async def test_one_that_answers_as_the_base_goes_back(
    site: Site, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its probe, before any request; and where nobody asks for that, by its answers."""
    monkeypatch.setattr("server.rollouts.replay.ANSWER_TOKENS", TOKENS)
    ended = await rolled_out(site, key, 3, GUARDS)
    assert ended["reason"] == "the new version answers as the base model does, unlike the live one"
    assert ended["numbers"] is None or ended["numbers"]["new"]["requests"] == 0
    others = dict.fromkeys(("length", "finish"))
    by_replays = {"probes": False, "drift": 0.01, "error_rate": 0.5}
    ended = await rolled_out(site, key, 3, GUARDS | others | by_replays)
    why = "the new version gives its tokens other probabilities"
    assert (ended["state"], ended["reason"]) == ("rolled_back", why), ended
    assert ended["numbers"]["new"]["requests"] > 0
    replays = ended["numbers"]["replays"]
    assert (replays["failed"], replays["changed"]) == (0, 1.0), replays
    assert replays["drift"] > 0.01
    assert replays["divergence"] > 0.001
    assert (await site.admin.get(ADAPTER)).json()["live"] == 1


async def test_one_that_fails_on_some_prompts_goes_back(site: Site, key: str) -> None:
    guards = dict.fromkeys(("length", "finish"))
    ended = await rolled_out(site, key, 4, GUARDS | guards)
    assert (ended["state"], ended["reason"]) == ("rolled_back", "the new version refuses more often")
    assert (await site.admin.get(ADAPTER)).json()["live"] == 1

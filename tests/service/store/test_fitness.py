"""What is stored and what the engine of now serves: every start looks, and nothing is answered otherwise."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from adapters.errors import CURES
from adapters.model import CONFIG_FILE, WEIGHTS_FILE, BaseModel, ModuleShape, Tier
from adapters.store.blobs import BlobStore
from adapters.store.fitness import Fitness
from server.publishing import truth
from tests.service.http.test_api import error
from tests.support import tiny
from tests.support.databases import opened
from tests.support.fakes import FakeEngine
from tests.support.site import Site
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

ADAPTER = "/admin/v1/tenants/acme/adapters/a"
NARROW = {"model.layers.0.self_attn.q_proj"}


def engine_of(base: BaseModel, **fields: Any) -> FakeEngine:
    engine = FakeEngine(base)
    for name, value in fields.items():
        setattr(engine, name, value)
    return engine


def narrowed(base: BaseModel) -> BaseModel:
    return replace(base, modules={n: shape for n, shape in base.modules.items() if n in NARROW})


def reshaped(base: BaseModel) -> BaseModel:
    return replace(base, modules=dict.fromkeys(base.modules, ModuleShape(32, 32)))


def low_rank(base: BaseModel) -> BaseModel:
    return replace(base, max_lora_rank=1)


def retrained(base: BaseModel) -> BaseModel:
    """Another model of the same shapes."""
    return replace(base, fingerprint="b" * 64)


def overwrite(path: Path, at: int = -4) -> None:
    """Changes one byte of a file that was written once and is read-only."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.parent.chmod(0o755)
    path.chmod(0o644)
    path.write_bytes(data)


def blob_of(folder: Path) -> Path:
    (blob,) = (folder / "blobs").iterdir()
    return blob


async def metric(site: Site, reason: str) -> float:
    page = (await site.admin.get("/metrics")).text
    name = f'loraplex_unserved_versions{{reason="{reason}"}} '
    return next(float(line.removeprefix(name)) for line in page.splitlines() if line.startswith(name))


async def problem_of(site: Site) -> dict[str, str] | None:
    shown = (await site.admin.get(ADAPTER)).json()["versions"][0]["problem"]
    assert shown is None or set(shown) == {"code", "message"}
    return shown  # type: ignore[no-any-return]


BASE = replace(tiny.base(), fingerprint="a" * 64)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (narrowed, "v_proj"),
        (reshaped, "shape"),
        (low_rank, "rank"),
        (retrained, "another base model"),
    ],
)
async def test_what_the_engine_of_now_cannot_serve_is_refused_and_named_until_it_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[BaseModel], BaseModel], why: str
) -> None:
    async with fake_site(tmp_path, engine_of(BASE)) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        assert (await site.chat(key, "hi", model="a")).status_code == 200
        assert await problem_of(site) is None
    for _ in range(2):  # the second start knows it from the first
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            async with fake_site(tmp_path, engine_of(change(BASE))) as site:
                assert "acme/a@1 is not served" in caplog.text
                for model in ("a", "a@1", "default"):
                    refused = error(await site.chat(key, "hi", model=model), 409, "adapter_unfit")
                    assert why in refused["message"]
                    assert not any(cure in refused["message"] for cure in CURES.values()), "it was accepted"
                assert (await site.chat(key, "hi", model=tiny.NAME)).status_code == 200
                shown = await problem_of(site)
                assert shown is not None
                assert shown["code"] == "adapter_unfit"
                listed = await site.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
                assert [card["id"] for card in listed.json()["data"]] == [tiny.NAME]
                assert await metric(site, "unfit") == 1
                assert await metric(site, "damaged") == 0
    async with fake_site(tmp_path, engine_of(BASE)) as site:
        assert (await site.chat(key, "hi", model="a")).status_code == 200
        assert await problem_of(site) is None
        assert await metric(site, "unfit") == 0


async def test_a_narrower_type_is_looked_at_value_by_value(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    shutil.copytree(tiny.adapter(1), folder)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS_FILE)
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name][0, 0] = 1e5  # beyond float16
    save_file(tensors, folder / WEIGHTS_FILE)
    async with fake_site(tmp_path / "data", engine_of(BASE)) as site:
        key = await site.tenant("acme")
        files = {n: (folder / n).read_bytes() for n in (CONFIG_FILE, WEIGHTS_FILE)}
        where = f"{ADAPTER}/versions?allow_implausible=true"
        assert (await site.admin.post(where, files=files)).status_code == 201
    async with fake_site(tmp_path / "data", engine_of(BASE, lora_dtype="float16")) as site:
        refused = error(await site.chat(key, "hi", model="a"), 409, "adapter_unfit")
        assert "float16" in refused["message"]
    async with fake_site(tmp_path / "data", engine_of(BASE, lora_dtype="bfloat16")) as site:
        assert (await site.chat(key, "hi", model="a")).status_code == 200


async def test_in_a_split_the_other_version_takes_over(tmp_path: Path) -> None:
    async with fake_site(tmp_path, engine_of(BASE)) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
    async with fake_site(tmp_path, engine_of(retrained(BASE))) as site:
        assert (await site.upload("acme", "a", tiny.adapter(2))).status_code == 201
        split = await site.admin.patch(ADAPTER, json={"split": {"1": 50, "2": 50}})
        assert split.status_code == 200
        for user in map(str, range(12)):
            answered = await site.chat(key, "hi", model="a", user=user)
            assert answered.headers["X-Loraplex-Version"] == "a@2"


async def test_a_base_that_stands_in_for_another_serves_its_adapters(tmp_path: Path) -> None:
    async with fake_site(tmp_path, engine_of(BASE)) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
    async with fake_site(tmp_path, engine_of(retrained(BASE)), same_bases=("a" * 64,)) as site:
        assert (await site.chat(key, "hi", model="a")).status_code == 200


async def test_a_version_is_looked_at_before_it_is_loaded_however_long_the_first_look_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fake_site(tmp_path, engine_of(BASE)) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        assert (await site.admin.patch(ADAPTER, json={"pinned": True})).status_code == 200

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(truth, "hold_all", never)
    monkeypatch.setattr(truth, "START_S", 0.1)
    engine = engine_of(narrowed(BASE))
    async with fake_site(tmp_path, engine) as site:
        error(await site.chat(key, "hi", model="a"), 409, "adapter_unfit")
    assert engine.ops == []


async def test_verdicts_of_the_last_start_are_known_without_reading_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fake_site(tmp_path, engine_of(BASE)) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})

    def read(*_: object) -> None:
        raise AssertionError("a file was read")

    monkeypatch.setattr("adapters.store.fitness._verdict", read)
    async with fake_site(tmp_path, engine_of(BASE)) as site:
        assert (await site.chat(key, "hi", model="a")).status_code == 200
    assert len(list((tmp_path / "fits").iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 3}'])
async def test_a_cache_that_cannot_be_read_is_made_anew(tmp_path: Path, content: bytes) -> None:
    async with fake_site(tmp_path, engine_of(BASE)) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
    (cache,) = (tmp_path / "fits").iterdir()
    cache.write_bytes(content)
    async with fake_site(tmp_path, engine_of(BASE)) as site:
        assert (await site.chat(key, "hi", model="a")).status_code == 200
    assert blob_of(tmp_path).name.encode() in cache.read_bytes()


async def test_a_changed_byte_is_noticed_at_the_first_read_after_a_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with fake_site(tmp_path, engine_of(BASE)) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        other = await site.tenant("other", {"a": tiny.adapter(2)})
        digest = (await site.admin.get(ADAPTER)).json()["versions"][0]["digest"]
    weights = tmp_path / "blobs" / digest / WEIGHTS_FILE
    good = weights.read_bytes()
    overwrite(weights)
    engine = engine_of(BASE)
    async with fake_site(tmp_path, engine) as site:
        with caplog.at_level(logging.ERROR):
            answer = await site.chat(key, "hi", model="a")
            error(answer, 503, "adapter_damaged")
            assert int(answer.headers["Retry-After"]) > 0
        assert f"the files of {digest} are damaged" in caplog.text
        assert (await site.chat(other, "hi", model="a")).status_code == 200
        assert not any(digest in op.path for op in engine.ops)
        assert await metric(site, "damaged") == 1
        shown = await problem_of(site)
        assert shown is not None
        assert shown["code"] == "adapter_damaged"
        # An upload of the same files mends them.
        assert (await site.upload("acme", "a", tiny.adapter(1))).status_code == 201
        assert (await site.chat(key, "hi", model="a@1")).status_code == 200
        assert await metric(site, "damaged") == 0
    assert weights.read_bytes() == good


async def test_a_byte_that_changes_while_the_server_runs_is_noticed_at_the_next_load(tmp_path: Path) -> None:
    async with fake_site(tmp_path, engine_of(BASE)) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        assert (await site.chat(key, "hi", model="a")).status_code == 200
        overwrite(blob_of(tmp_path) / WEIGHTS_FILE)
        assert (await site.chat(key, "hi", model="a")).status_code == 200  # from memory, as uploaded
        version = await site.services.publishing.catalog.resolve("acme", "a")
        site.services.dispatcher.retire(version)
        while site.services.dispatcher.tier_of(version) is not Tier.DISK:
            await asyncio.sleep(0.01)
        error(await site.chat(key, "hi", model="a"), 503, "adapter_damaged")


async def test_the_scrub_finds_what_nobody_reads(tmp_path: Path) -> None:
    async with fake_site(tmp_path, engine_of(BASE)) as site:
        await site.tenant("acme", {"a": tiny.adapter(1)})
    weights = blob_of(tmp_path) / WEIGHTS_FILE
    good = weights.read_bytes()
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    overwrite(weights)
    os.utime(weights, ns=times)  # as a failing disk leaves them
    async with fake_site(tmp_path, engine_of(BASE), scrub_rate=1 << 30) as site:
        async with asyncio.timeout(60):
            while await metric(site, "damaged") == 0:
                await asyncio.sleep(0.05)
        weights.write_bytes(good)
        again = truth.look_again(site.services.publishing.fitness, site.services.database, 0.05)
        looking = asyncio.create_task(again)
        async with asyncio.timeout(60):
            while await metric(site, "damaged") == 1:
                await asyncio.sleep(0.05)
        looking.cancel()


async def test_a_deleted_version_is_not_called_damaged(tmp_path: Path) -> None:
    async with fake_site(tmp_path, engine_of(BASE)) as site:
        await site.tenant("acme", {"a": tiny.adapter(1)})
        assert (await site.admin.delete(ADAPTER)).status_code == 204
        async with asyncio.timeout(60):
            while list((tmp_path / "blobs").iterdir()):
                await asyncio.sleep(0.02)
        assert await metric(site, "damaged") == 0
        fitness = site.services.publishing.fitness
        assert fitness.known() == set()


async def test_where_there_is_no_version_none_is_looked_for(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path, max_bytes=1)
    async with opened("sqlite", tmp_path) as database:
        seen: list[str] = []
        event.listen(
            database._engine.sync_engine, "before_cursor_execute", lambda *args: seen.append(args[2])
        )
        await truth.hold_all(Fitness(blobs), database, blobs.path)
    assert [statement.split(" ", 1)[0] for statement in seen if statement != "BEGIN"] == ["SELECT"]

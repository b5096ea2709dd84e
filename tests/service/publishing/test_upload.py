"""Uploads over real HTTP, through inspection, to the disk and the database, and back after a restart."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.numpy import load_file, save, save_file

from adapters.inspection.convert import Conversion
from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from adapters.store.digests import digest_of
from tests.service.http.test_api import error
from tests.support import tiny
from tests.support.site import ADMIN_KEY, Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

URL = "/admin/v1/tenants/acme/adapters/a/versions"
LIMIT = 200_000
BOTH = (CONFIG_FILE, WEIGHTS_FILE)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path, max_upload_bytes=LIMIT) as site:
        await site.admin.post("/admin/v1/tenants", json={"id": "acme"})
        yield site


def files(seed: int = 1) -> dict[str, bytes]:
    return {name: (tiny.adapter(seed) / name).read_bytes() for name in BOTH}


def tensors(seed: int) -> dict[str, Any]:
    return load_file(tiny.adapter(seed) / WEIGHTS_FILE)


def blobs(folder: Path) -> list[str]:
    """Names of the blobs; nothing else may be lying about."""
    assert list((folder / "quarantine").iterdir()) == []
    return sorted(path.name for path in (folder / "blobs").iterdir())


async def nothing_kept(site: Site, folder: Path) -> None:
    assert blobs(folder) == []
    assert (await site.admin.get("/admin/v1/tenants/acme/adapters")).json()["data"] == []


# --- what is accepted -------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [BOTH, BOTH[::-1]])
async def test_an_upload_answers_with_what_it_is(site: Site, tmp_path: Path, order: tuple[str, str]) -> None:
    made = await site.admin.post(URL, files=[(name, ("whatever.bin", files()[name])) for name in order])
    assert made.status_code == 201, made.text
    body = made.json()
    assert body.keys() == {"adapter", "version", "digest", "live", "report"}
    assert (body["adapter"], body["version"], body["live"]) == ("a", 1, 1)
    assert body["report"]["rank"] == 2
    assert body["report"]["target_modules"] == ["q_proj", "v_proj"]
    assert body["report"]["size_bytes"] == sum(map(len, files().values()))
    assert blobs(tmp_path) == [body["digest"]]
    for name, content in files().items():
        stored = tmp_path / "blobs" / body["digest"] / name
        assert stored.read_bytes() == content
        assert not os.stat(stored).st_mode & 0o222


async def test_what_was_converted_is_stored_under_a_digest_of_its_own(site: Site, tmp_path: Path) -> None:
    named = {name.replace(".weight", ".default.weight"): x for name, x in tensors(1).items()}
    sent = {CONFIG_FILE: files()[CONFIG_FILE], WEIGHTS_FILE: save(named)}
    body = (await site.admin.post(URL, files=sent)).json()
    report = body["report"]
    assert report["conversions"] == ["the adapter's name was taken out of the tensors' names: 'default'"]
    lines = "".join(
        f"{name} {len(content)} {hashlib.sha256(content).hexdigest()}\n"
        for name, content in sorted(sent.items())
    )
    assert report["original_digest"] == hashlib.sha256(lines.encode()).hexdigest()
    assert body["digest"] != report["original_digest"]
    assert blobs(tmp_path) == [body["digest"]]
    stored = tmp_path / "blobs" / body["digest"]
    assert digest_of(stored) == body["digest"]
    assert load_file(stored / WEIGHTS_FILE).keys() == tensors(1).keys()
    assert report["size_bytes"] == sum(path.stat().st_size for path in stored.iterdir())


async def test_a_disk_that_fills_up_while_converting_is_a_507(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Conversion, "write", full)
    named = {name.replace(".weight", ".default.weight"): x for name, x in tensors(1).items()}
    sent = {CONFIG_FILE: files()[CONFIG_FILE], WEIGHTS_FILE: save(named)}
    error(await site.admin.post(URL, files=sent), 507, "storage_full")
    await nothing_kept(site, tmp_path)


async def test_the_same_bytes_twice_are_two_versions_of_one_blob(site: Site, tmp_path: Path) -> None:
    made = [(await site.admin.post(URL, files=files())).json() for _ in range(2)]
    assert [one["version"] for one in made] == [1, 2]
    assert len({one["digest"] for one in made}) == 1
    assert len(blobs(tmp_path)) == 1


async def test_uploads_at_the_same_time_all_count(site: Site, tmp_path: Path) -> None:
    seeds = [1, 2, 3, 1]
    made = await asyncio.gather(*(site.admin.post(URL, files=files(seed)) for seed in seeds))
    assert [one.status_code for one in made] == [201] * 4
    assert sorted(one.json()["version"] for one in made) == [1, 2, 3, 4]
    assert len(blobs(tmp_path)) == 3
    shown = (await site.admin.get("/admin/v1/tenants/acme/adapters/a")).json()
    by_number = {version["version"]: version["digest"] for version in shown["versions"]}
    assert by_number == {one.json()["version"]: one.json()["digest"] for one in made}
    assert shown["live"] == 4


async def test_a_slow_upload_keeps_nobody_waiting(site: Site) -> None:
    request = httpx.Request("POST", f"{site.url}{URL}", files=files())
    whole, go_on = request.read(), asyncio.Event()

    async def in_halves() -> AsyncIterator[bytes]:
        yield whole[: len(whole) // 2]
        await go_on.wait()
        yield whole[len(whole) // 2 :]

    headers = {"Content-Type": request.headers["content-type"]}
    slow = asyncio.create_task(site.admin.post(URL, content=in_halves(), headers=headers))
    quick = await site.admin.post(URL, files=files(2))
    assert (quick.status_code, quick.json()["version"]) == (201, 1)
    go_on.set()
    assert (await slow).json()["version"] == 2


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
async def test_a_file_is_missing(site: Site, tmp_path: Path, name: str) -> None:
    rest = {other: content for other, content in files().items() if other != name}
    said = error(await site.admin.post(URL, files=rest), 400, "upload_incomplete")
    assert name in said["message"]
    await nothing_kept(site, tmp_path)


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ("README.md", "unexpected_file"),
        ("../adapter_config.json", "unexpected_file"),
        ("adapter_model.bin", "weights_not_safetensors"),
        ("x" * 1000, "unexpected_file"),
    ],
)
async def test_a_file_too_many(site: Site, tmp_path: Path, extra: str, code: str) -> None:
    for sent in ({**files(), extra: b"x"}, {extra: b"x", **files()}):
        refused = await site.admin.post(URL, files=sent)
        assert refused.status_code == 422, refused.text
        assert refused.json()["error"]["code"] == code
        assert len(refused.text) < 3000
    await nothing_kept(site, tmp_path)


async def test_a_file_twice(site: Site, tmp_path: Path) -> None:
    for name in BOTH:
        twice = [*files().items(), (name, files()[name])]
        refused = await site.admin.post(URL, files=[(field, content) for field, content in twice])
        assert "came twice" in error(refused, 400, "multipart_invalid")["message"]
    await nothing_kept(site, tmp_path)


@pytest.mark.parametrize(
    "kind", ["application/json", "multipart/form-data", "application/octet-stream", None]
)
async def test_another_content_type(site: Site, tmp_path: Path, kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    error(await site.admin.post(URL, content=b"{}", headers=headers), 400, "invalid_request")
    await nothing_kept(site, tmp_path)


async def test_too_large(site: Site, tmp_path: Path) -> None:
    for sent in (
        {**files(), WEIGHTS_FILE: b"x" * (LIMIT + 1)},
        {CONFIG_FILE: b"x" * (LIMIT + (1 << 20))},
    ):
        refused = await site.admin.post(URL, files=sent)
        assert refused.status_code == 413, refused.text
        assert refused.json()["error"]["code"] in ("upload_too_large", "body_too_large")
    request = httpx.Request("POST", f"{site.url}{URL}", files={CONFIG_FILE: b"x" * (LIMIT + (1 << 20))})

    async def undeclared() -> AsyncIterator[bytes]:
        yield request.read()

    headers = {"Content-Type": request.headers["content-type"]}
    refused = await site.admin.post(URL, content=undeclared(), headers=headers)
    assert refused.status_code == 413
    await nothing_kept(site, tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
async def test_a_body_that_ends_too_early(site: Site, tmp_path: Path, share: float) -> None:
    request = httpx.Request("POST", f"{site.url}{URL}", files=files())
    body = request.read()
    headers = {"Content-Type": request.headers["content-type"]}
    refused = await site.admin.post(URL, content=body[: int(len(body) * share)], headers=headers)
    error(refused, 400, "upload_incomplete")
    await nothing_kept(site, tmp_path)


async def test_a_client_that_hangs_up_leaves_nothing(site: Site, tmp_path: Path) -> None:
    request = httpx.Request("POST", f"{site.url}{URL}", files=files())
    body = request.read()
    _, writer = await asyncio.open_connection("127.0.0.1", int(site.url.rsplit(":", 1)[1]))
    head = {**bearer(ADMIN_KEY), **request.headers}
    lines = [f"POST {URL} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
    writer.write("\r\n".join(lines).encode() + body[:-200])
    await writer.drain()
    async with asyncio.timeout(60):
        while not list((tmp_path / "quarantine").iterdir()):
            await asyncio.sleep(0.01)
        writer.close()
        while list((tmp_path / "quarantine").iterdir()):
            await asyncio.sleep(0.01)
    await nothing_kept(site, tmp_path)


@pytest.mark.parametrize("name", ["default", tiny.NAME, "-a", "a@1", "a b", "%C3%A4", "x" * 129])
async def test_names_that_no_adapter_may_have(site: Site, tmp_path: Path, name: str) -> None:
    refused = await site.admin.post(URL.replace("/a/", f"/{name}/"), files=files())
    error(refused, 422, "name_invalid", "name")
    await nothing_kept(site, tmp_path)


async def test_an_unknown_tenant(site: Site, tmp_path: Path) -> None:
    error(await site.admin.post(URL.replace("acme", "zeta"), files=files()), 404, "not_found")
    await nothing_kept(site, tmp_path)


async def test_a_tenant_that_goes_while_its_upload_comes(site: Site, tmp_path: Path) -> None:
    request = httpx.Request("POST", f"{site.url}{URL}", files=files())
    whole, go_on = request.read(), asyncio.Event()

    async def in_halves() -> AsyncIterator[bytes]:
        yield whole[:-1]
        await go_on.wait()
        yield whole[-1:]

    headers = {"Content-Type": request.headers["content-type"]}
    slow = asyncio.create_task(site.admin.post(URL, content=in_halves(), headers=headers))
    async with asyncio.timeout(60):
        while not list((tmp_path / "quarantine").iterdir()):
            await asyncio.sleep(0.01)
    assert (await site.admin.delete("/admin/v1/tenants/acme")).status_code == 204
    go_on.set()
    error(await slow, 404, "tenant_not_found")
    assert blobs(tmp_path) == []


async def test_what_inspection_refuses_is_not_kept(site: Site, tmp_path: Path) -> None:
    weights = load_file(tiny.adapter(1) / WEIGHTS_FILE)
    save_file({name: tensor[..., :-1].copy() for name, tensor in weights.items()}, tmp_path / "narrow")
    narrow = (tmp_path / "narrow").read_bytes()
    config = json.loads(files()[CONFIG_FILE])
    for changed, code in (
        ({WEIGHTS_FILE: narrow}, None),
        ({WEIGHTS_FILE: b"\x80\x04pickle"}, None),
        ({CONFIG_FILE: b"{"}, "config_invalid"),
        ({CONFIG_FILE: json.dumps(config | {"use_dora": True}).encode()}, "dora_unsupported"),
        ({CONFIG_FILE: json.dumps(config | {"r": 64}).encode()}, None),
    ):
        refused = await site.admin.post(URL, files={**files(), **changed})
        assert refused.status_code == 422, refused.text
        assert refused.json()["error"]["code"] == (code or refused.json()["error"]["code"])
    await nothing_kept(site, tmp_path)


# --- after a restart --------------------------------------------------------------------------------


async def test_what_was_acknowledged_is_served_after_a_restart(tmp_path: Path) -> None:
    async with fake_site(tmp_path) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2)})
        await site.upload("acme", "a", tiny.adapter(3))
        await site.admin.patch("/admin/v1/tenants/acme/adapters/b", json={"default": True, "pinned": True})
        shown = (await site.admin.get("/admin/v1/tenants/acme/adapters")).json()
        before = [await site.chat(key, "hi", model=model) for model in ("a", "a@1", "default")]
    orphan, recent = (tmp_path / "blobs" / (digit * 64) for digit in "01")
    orphan.mkdir()
    recent.mkdir()
    os.utime(orphan, times=(0, time.time() - 90_000))
    (tmp_path / "quarantine" / "left-behind").mkdir()
    async with fake_site(tmp_path) as site:
        assert not orphan.exists()
        assert recent.exists(), "its row may only be missing by mistake"
        assert list((tmp_path / "quarantine").iterdir()) == []
        after = [await site.chat(key, "hi", model=model) for model in ("a", "a@1", "default")]
        assert [one.json()["choices"] for one in after] == [one.json()["choices"] for one in before]
        assert after[2].json()["model"] == "b"
        again = (await site.admin.get("/admin/v1/tenants/acme/adapters")).json()
        for adapter in (*shown["data"], *again["data"]):
            for part in (adapter, *adapter["versions"]):
                del part["tier"]
        assert again == shown
        host = (await site.admin.get("/admin/v1/residency")).json()["host"]
        (pinned,) = [entry for entry in host if entry["version"].startswith("acme/b@")]
        assert pinned["pinned"] is True

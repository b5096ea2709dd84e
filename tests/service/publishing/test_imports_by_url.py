"""Imports by URL: only from where the operator allows, and from nowhere that only the server can reach."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from server.errors import Forbidden
from server.publishing import intake
from server.publishing.fetch import allow
from tests.service.http.test_api import error
from tests.service.store.test_archives import packed
from tests.support import tiny
from tests.support.site import Site
from tests.support.tiny import fake_site

URL = "/admin/v1/tenants/acme/adapters/a/versions"
PREFIXES = ["https://models.example/adapters/", "file:///srv/adapters", "http://10.0.0.7/"]


@pytest.mark.parametrize(
    ("source", "private"),
    [
        ("https://models.example/adapters/a", False),
        ("https://models.example/adapters/a/b.tar.gz?version=3", False),
        ("file:///srv/adapters/a", False),
        ("http://10.0.0.7/a", True),
    ],
)
def test_what_lies_under_a_prefix_is_allowed(source: str, private: bool) -> None:
    assert allow(source, PREFIXES).private is private


@pytest.mark.parametrize(
    "source",
    [
        "", "x", "https://models.example", "https://models.example/other/a",
        "http://models.example/adapters/a", "https://models.example.evil/adapters/a",
        "https://models.example/adapters/../secret", "https://models.example/adapters/%2e%2e/secret",
        "https://models.example/adapters/..\\secret", "https://models.example/adapters/a\r\nX: y",
        "https://user@models.example/adapters/a", "https://evil@models.example/adapters/a",
        "file:///srv/adapters-of-others/a", "file:///srv/adapters/../../etc", "file:///etc/passwd",
        "file:///srv/adapters/a::https://models.example/adapters/b", "http://10.0.0.70/a",
        "http://169.254.169.254/latest/meta-data", "s3://bucket/a",
    ],
)  # fmt: skip
def test_anything_else_is_forbidden(source: str) -> None:
    with pytest.raises(Forbidden) as caught:
        allow(source, PREFIXES)
    assert caught.value.code == "source_forbidden"


@dataclass
class Web:
    """A web server of ``pages``: path -> (status, headers, body). ``asked`` are the paths, in order."""

    port: int
    pages: dict[str, tuple[int, dict[str, str], bytes]]
    asked: list[str]

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


@pytest.fixture
async def web() -> AsyncIterator[Web]:
    web = Web(0, {}, [])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split(b" ")[1].decode()
        web.asked.append(path)
        status, headers, body = web.pages.get(path, (404, {}, b""))
        lines = [f"HTTP/1.1 {status} x", *(f"{name}: {value}" for name, value in headers.items())]
        lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
        writer.write("\r\n".join(lines).encode() + body)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    web.port = server.sockets[0].getsockname()[1]
    folder = tiny.adapter(1)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        web.pages[f"/ok/run/{name}"] = (200, {}, (folder / name).read_bytes())
    web.pages["/ok/run.tar.gz"] = (200, {}, packed("w:gz"))
    web.pages["/ok/large.zip"] = (200, {}, b"PK" * 200_000)
    web.pages["/ok/moved.zip"] = (302, {"Location": "/ok/run.zip"}, b"")
    web.pages["/ok/run.zip"] = (200, {}, packed("zip"))
    web.pages["/ok/out.zip"] = (302, {"Location": "/secret.zip"}, b"")
    web.pages["/secret.zip"] = (200, {}, packed("zip"))
    web.pages["/ok/to-a-file.zip"] = (302, {"Location": "file:///etc/passwd"}, b"")
    web.pages["/ok/round.zip"] = (302, {"Location": "/ok/round.zip"}, b"")
    yield web
    server.close()


@pytest.fixture
async def site(web: Web, tmp_path: Path) -> AsyncIterator[Site]:
    prefixes = (web.url("/ok/"), web.url("/ok/", "named.example"), (tmp_path / "shelf").as_uri())
    async with fake_site(tmp_path / "data", max_upload_bytes=200_000, import_prefixes=prefixes) as site:
        await site.admin.post("/admin/v1/tenants", json={"id": "acme"})
        yield site


async def fetch(site: Site, source: Any) -> httpx.Response:
    return await site.admin.post(URL, json={"source": source})


async def test_off_unless_a_prefix_is_named(web: Web, tmp_path: Path) -> None:
    async with fake_site(tmp_path) as site:
        await site.admin.post("/admin/v1/tenants", json={"id": "acme"})
        error(await fetch(site, web.url("/ok/run")), 400, "invalid_request")
    assert web.asked == []


@pytest.mark.parametrize("path", ["/ok/run", "/ok/run/", "/ok/run.tar.gz", "/ok/moved.zip"])
async def test_a_folder_or_an_archive_is_fetched(site: Site, web: Web, path: str) -> None:
    made = await fetch(site, web.url(path))
    assert made.status_code == 201, made.text
    assert made.json()["digest"] == (await site.upload("acme", "b", tiny.adapter(1))).json()["digest"]


async def test_a_file_is_fetched_unless_a_link_leads_out(site: Site, tmp_path: Path) -> None:
    shelf, secret = tmp_path / "shelf", tmp_path / "secret.zip"
    shelf.mkdir()
    (shelf / "run.zip").write_bytes(packed("zip"))
    secret.write_bytes(packed("zip"))
    (shelf / "link.zip").symlink_to(secret)
    assert (await fetch(site, (shelf / "run.zip").as_uri())).status_code == 201
    error(await fetch(site, f"{shelf.as_uri()}/link.zip"), 403, "source_forbidden", "source")
    error(await fetch(site, f"{shelf.as_uri()}/none.zip"), 422, "source_unavailable", "source")


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/secret.zip", 403, "source_forbidden"),
        ("/ok/out.zip", 403, "source_forbidden"),
        ("/ok/to-a-file.zip", 403, "source_forbidden"),
        ("/ok/round.zip", 422, "source_unavailable"),
        ("/ok/none", 422, "source_unavailable"),
        ("/ok/large.zip", 413, "upload_too_large"),
    ],
)
async def test_what_is_not_fetched(
    site: Site, web: Web, tmp_path: Path, path: str, status: int, code: str
) -> None:
    refused = await fetch(site, web.url(path))
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, code), refused.text
    assert "/secret.zip" not in web.asked
    assert list((tmp_path / "data" / "quarantine").iterdir()) == []


@pytest.mark.parametrize("body", [{}, {"source": 3}, {"source": "x", "more": 1}, {"source": None}])
async def test_another_body(site: Site, body: dict[str, Any]) -> None:
    error(await site.admin.post(URL, json=body), 400, "invalid_request", "source")


async def test_a_name_with_a_private_address_is_not_asked(
    site: Site, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is under a prefix, but that names no address: somebody may have changed what the name stands for."""

    async def private(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr("server.publishing.fetch.look_up", private)
    refused = await fetch(site, web.url("/ok/run.zip", "named.example"))
    error(refused, 403, "source_forbidden", "source")
    assert web.asked == []


async def test_the_reserve_is_looked_at_while_an_archive_is_fetched(
    site: Site, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive is no archive and is kept until it ends: only its bytes can stop it before."""
    disk = shutil.disk_usage(site.services.settings.data_dir)
    free = iter([disk])

    def look(_: Path) -> Any:
        return next(free, disk._replace(free=0))

    monkeypatch.setattr(intake, "LOOK_EVERY", 1000)
    monkeypatch.setattr("server.publishing.intake.shutil.disk_usage", look)
    web.pages["/ok/large.zip"] = (200, {}, b"PK" * 90_000)
    answer = await site.admin.post(URL, json={"source": web.url("/ok/large.zip")})
    error(answer, 507, "storage_full")

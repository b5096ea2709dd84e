"""Uploads that are broken or meant to break us, over HTTP, beside a customer who is being answered.

What is wrong with the files is ``test_spoiled``'s list, here through the front door; what is wrong with
the request is below. Each gets its status and code; nothing of it is kept, and nobody else notices.
"""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
import zipfile
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from adapters.model import CONFIG_FILE, INITIAL_FILE, WEIGHTS_FILE
from tests.pure.adapters.test_spoiled import BAD
from tests.support.fakes import FakeEngine, Times
from tests.support.peft_adapters import base, good, read, write
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site

__all__ = ["base", "good"]

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore:max_tokens is deprecated"),
]

URL = "/admin/v1/tenants/acme/adapters/a/versions"
LIMIT = 4 << 20
# Bounds of their own have tests of their own.
AT_ONCE = {"max_uploads": 1000, "max_uploads_each": 1000}
ANSWER = "".join(f" {i}" for i in range(1, 30))

Files = dict[str, bytes]


@dataclass
class Control:
    """A customer who is answered all the time: so many pieces, so many answers, and what was none."""

    site: Site
    key: str
    pieces: int = 0
    answers: int = 0
    wrong: list[str] = field(default_factory=list)

    async def run(self) -> None:
        body = {"model": "mine", "messages": [{"role": "user", "content": "hi"}]}
        body |= {"max_tokens": 30, "stream": True}
        while True:
            text = ""
            async with self.site.http.stream(
                "POST", "/v1/chat/completions", json=body, headers=bearer(self.key)
            ) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                        self.pieces += 1
            if not text.endswith(ANSWER):
                self.wrong.append(f"{response.status_code} {text}")
            self.answers += 1


@dataclass
class Scene:
    site: Site
    engine: FakeEngine
    control: Control
    folder: Path
    good: Files

    async def kept(self) -> tuple[Any, list[str], list[str]]:
        """The catalog, and the names of what lies in ``blobs`` and in ``quarantine``."""
        shown = [
            (await self.site.admin.get(f"/admin/v1/tenants/{t}/adapters")).json() for t in ("acme", "control")
        ]
        for adapter in (adapter for one in shown for adapter in one["data"]):
            for part in (adapter, *adapter["versions"]):
                del part["tier"]
        return shown, *(sorted(p.name for p in (self.folder / f).iterdir()) for f in ("blobs", "quarantine"))

    async def refused(self, request: httpx.Request) -> httpx.Response:
        """What becomes of it; fails if anything is left of it, or if the control customer's answers stop."""
        before, pieces = await self.kept(), self.control.pieces
        response = await self.site.admin.send(request)
        assert await self.kept() == before
        async with asyncio.timeout(60):
            while self.control.pieces == pieces:
                await asyncio.sleep(0.005)
        assert self.control.wrong == []
        return response

    def post(self, url: str = URL, **options: Any) -> httpx.Request:
        return self.site.admin.build_request("POST", url, **options)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory, base: Any, good: Path) -> AsyncIterator[Scene]:
    folder = tmp_path_factory.mktemp("site")
    engine = FakeEngine(base, times=Times(step=0.005))
    async with fake_site(folder, engine, max_upload_bytes=LIMIT, **AT_ONCE) as site:
        await site.admin.post("/admin/v1/tenants", json={"id": "acme"})
        control = Control(site, await site.tenant("control", {"mine": good}))
        running = asyncio.create_task(control.run())
        files = {name: (good / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
        yield Scene(site, engine, control, folder, files)
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled(), running
        assert not engine.stopped


# --- the files ------------------------------------------------------------------------------------------

# The server casts to float32 and serves no fingerprint.
BAD_HERE = {name: bad for name, bad in BAD.items() if not (bad.serving_dtype or bad.fingerprint)}
# What the request lacks is said before the files are looked at, and what conversions find before inspection.
OTHERWISE = {
    "no config": (400, "upload_incomplete"),
    "no weights": (400, "upload_incomplete"),
    "fused": (422, "target_mismatch"),  # a conversion would split it, if it were targeted
}


@pytest.mark.parametrize("name", BAD_HERE)
async def test_spoiled_files_are_refused(scene: Scene, name: str, good: Path, tmp_path: Path) -> None:
    bad = BAD_HERE[name]
    config, tensors = read(good)
    bad.change(config, tensors)
    write(tmp_path, config, tensors)
    bad.damage(tmp_path)
    sent = {path.name: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    response = await scene.refused(scene.post(files=sent))
    said = response.json()["error"]
    assert (response.status_code, said["code"]) == OTHERWISE.get(name, (422, bad.code)), said
    assert len(response.content) < 3000


# --- the request ----------------------------------------------------------------------------------------


def multipart(*fields: tuple[bytes, bytes], boundary: bytes = b"xyz", end: bytes = b"--xyz--\r\n") -> bytes:
    """(the part's headers, content) as a body; nothing is escaped."""
    return b"".join(b"--%s\r\n%s\r\n\r\n%s\r\n" % (boundary, *field) for field in fields) + end


def form(files: Mapping[str, bytes]) -> list[tuple[bytes, bytes]]:
    return [(disposition(name), content) for name, content in files.items()]


def disposition(name: str, more: bytes = b"") -> bytes:
    return b'Content-Disposition: form-data; name="%s"%s' % (name.encode(), more)


def raw(
    body: bytes, kind: str | None = "multipart/form-data; boundary=xyz", **headers: str
) -> dict[str, Any]:
    return {"content": body, "headers": ({"Content-Type": kind} if kind else {}) | headers}


def archive(files: Files, kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as made:
            for name, content in files.items():
                made.writestr(name, content)
    else:
        with tarfile.open(fileobj=out, mode="w") as made:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                made.addfile(info, io.BytesIO(content))
    return out.getvalue()


def chunks(total: int) -> AsyncIterator[bytes]:
    """A weights file of ``total`` bytes without a declared length."""

    async def send() -> AsyncIterator[bytes]:
        yield multipart((disposition(WEIGHTS_FILE), b""), end=b"")[:-2]
        for _ in range(total >> 16):
            yield b"\0" * (1 << 16)

    return send()


def renamed(old: str, new: str) -> Callable[[Files], dict[str, Any]]:
    return lambda f: {"files": [(new if name == old else name, content) for name, content in f.items()]}


def extra(name: str, content: bytes = b"x") -> Callable[[Files], dict[str, Any]]:
    return lambda f: {"files": [*f.items(), (name, content)]}


def to(old: str, new: str) -> Callable[[Files], dict[str, Any]]:
    return lambda f: {"url": URL.replace(old, new), "files": f}


NOT_FOUND = (404, "not_found")
NO_NAME = (422, "name_invalid")
NOT_A_FORM = (400, "invalid_request")
BROKEN = (400, "multipart_invalid")
CUT = (400, "upload_incomplete")
UNEXPECTED = (422, "unexpected_file")
PICKLE = (422, "weights_not_safetensors")

REQUESTS: dict[str, tuple[tuple[int, str], Callable[[Files], dict[str, Any]]]] = {
    # the content type and the boundary
    "no body": (NOT_A_FORM, lambda f: {}),
    "no content type": (NOT_A_FORM, lambda f: raw(multipart(*form(f)), None)),
    "a form of fields": (NOT_A_FORM, lambda f: {"data": {"a": "b"}}),
    "another multipart": (NOT_A_FORM, lambda f: raw(multipart(*form(f)), "multipart/mixed; boundary=xyz")),
    "no boundary": (NOT_A_FORM, lambda f: raw(multipart(*form(f)), "multipart/form-data")),
    "an empty boundary": (NOT_A_FORM, lambda f: raw(multipart(*form(f)), 'multipart/form-data; boundary=""')),
    "an endless boundary": (
        NOT_A_FORM,
        lambda f: raw(multipart(*form(f)), f"multipart/form-data; boundary={'x' * 5000}"),
    ),
    "another boundary": (BROKEN, lambda f: raw(multipart(*form(f)), "multipart/form-data; boundary=abc")),
    "a boundary in another charset": (
        NOT_A_FORM,
        lambda f: raw(multipart(*form(f)), "multipart/form-data; boundary*=utf-8''%E2%82%AC"),
    ),
    "safetensors as they are": (NOT_A_FORM, lambda f: raw(f[WEIGHTS_FILE], "application/octet-stream")),
    # the parts
    "an empty body": (CUT, lambda f: raw(b"")),
    "only the end": (CUT, lambda f: raw(b"--xyz--\r\n")),
    "no end": (CUT, lambda f: raw(multipart(*form(f), end=b""))),
    "cut in the headers": (CUT, lambda f: raw(b'--xyz\r\nContent-Disposition: form-data; name="ad')),
    "cut in the weights": (CUT, lambda f: raw(multipart(*form(f))[:-200])),
    "noise": (BROKEN, lambda f: raw(bytes(range(256)) * 40)),
    "a header without a colon": (BROKEN, lambda f: raw(multipart((b"Content-Disposition", b"x")))),
    "NUL in a header's name": (BROKEN, lambda f: raw(multipart((b"Content\0: x", b"x")))),
    "an endless header": (BROKEN, lambda f: raw(multipart((b"X: " + b"y" * 100_000, b"x")))),
    "an endless name of a header": (BROKEN, lambda f: raw(multipart((b"y" * 100_000 + b": x", b"x")))),
    "a part without headers": (BROKEN, lambda f: raw(b"--xyz\r\n\r\nx\r\n--xyz--\r\n")),
    "a part without a name": (
        BROKEN,
        lambda f: raw(multipart((b"Content-Disposition: form-data", b"x"), *form(f))),
    ),
    "a part with an empty name": (BROKEN, lambda f: raw(multipart((disposition(""), b"x"), *form(f)))),
    "only a file's name": (
        BROKEN,
        lambda f: raw(multipart((b'Content-Disposition: form-data; filename="adapter_config.json"', b"x"))),
    ),
    "ten thousand parts": (
        UNEXPECTED,
        lambda f: raw(multipart(*[(disposition(f"p{i}"), b"") for i in range(10_000)])),
    ),
    # which files
    "no config": (CUT, lambda f: {"files": {WEIGHTS_FILE: f[WEIGHTS_FILE]}}),
    "no weights": (CUT, lambda f: {"files": {CONFIG_FILE: f[CONFIG_FILE]}}),
    "the config twice": (BROKEN, lambda f: extra(CONFIG_FILE, f[CONFIG_FILE])(f)),
    "the weights twice": (BROKEN, lambda f: extra(WEIGHTS_FILE, f[WEIGHTS_FILE])(f)),
    "each under the other's name": (
        (422, "config_invalid"),
        lambda f: {"files": {CONFIG_FILE: f[WEIGHTS_FILE], WEIGHTS_FILE: f[CONFIG_FILE]}},
    ),
    "initial weights that nobody needs": (UNEXPECTED, lambda f: extra(INITIAL_FILE, f[WEIGHTS_FILE])(f)),
    "a file too many": (UNEXPECTED, extra("README.md")),
    "code beside": (UNEXPECTED, extra("modeling.py", b"import os")),
    "a pickle beside": (PICKLE, extra("adapter_model.bin", b"\x80\x04.")),
    "a checkpoint beside": (PICKLE, extra("optimizer.pt", b"\x80\x04.")),
    "a pickle under another extension": (
        PICKLE,
        lambda f: {"files": f | {WEIGHTS_FILE: b"\x80\x04cos\nsystem\n(S'true'\ntR."}},
    ),
    "a zip in place of the weights": (PICKLE, lambda f: {"files": f | {WEIGHTS_FILE: archive(f, "zip")}}),
    "a tar in place of the weights": (
        (422, "weights_invalid"),
        lambda f: {"files": f | {WEIGHTS_FILE: archive(f, "tar")}},
    ),
    # names of files
    **{
        f"{name!r} in place of the config": (UNEXPECTED, renamed(CONFIG_FILE, name))
        for name in (
            "../adapter_config.json", "/etc/passwd", "a/adapter_config.json", "..", ".", "C:\\x", "ädapter",
            "adapter_config.json ", "ADAPTER_CONFIG.JSON", "adapter_config.json\\..\\x",
            "adapter_config.json%00", ".adapter_config.json.part", "x" * 3000,
        )
    },
    "NUL in a file's name": (
        UNEXPECTED,
        lambda f: raw(multipart((disposition(f"{CONFIG_FILE}\0.txt"), b"x"), *form(f))),
    ),
    # sizes
    "too large by one file": (
        (413, "body_too_large"),
        lambda f: {"files": f | {WEIGHTS_FILE: b"\0" * (LIMIT + (1 << 20))}},
    ),
    "too large by both": (
        (413, "upload_too_large"),
        lambda f: {"files": {CONFIG_FILE: b"\0" * (LIMIT // 2), WEIGHTS_FILE: b"\0" * (LIMIT // 2 + 1)}},
    ),
    "too large, undeclared": (
        (413, "body_too_large"),
        lambda f: raw(chunks(LIMIT * 2)),
    ),
    # where to
    "a path as the adapter's name": (NOT_FOUND, to("/a/", "/..%2F..%2Fx/")),
    "a name with a space": (NO_NAME, to("/a/", "/a%20b/")),
    "a name with NUL": (NO_NAME, to("/a/", "/a%00/")),
    "a name that is taken": (NO_NAME, to("/a/", "/default/")),
    "a tenant that is not": (NOT_FOUND, to("acme", "nobody")),
    "a tenant with NUL": (NOT_FOUND, to("acme", "acme%00")),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_spoiled_request_is_refused(scene: Scene, name: str) -> None:
    expected, make = REQUESTS[name]
    response = await scene.refused(scene.post(**make(scene.good)))
    said = response.json()["error"]
    assert (response.status_code, said["code"]) == expected, said
    assert len(response.content) < 3000


@pytest.mark.parametrize("key", [None, "", "Bearer", "Bearer wrong", "Basic YTpi"])
async def test_without_the_admin_key_nothing_is_read(scene: Scene, key: str | None) -> None:
    request = scene.post(files=scene.good)
    del request.headers["Authorization"]
    if key is not None:
        request.headers["Authorization"] = key
    response = await scene.refused(request)
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")


async def test_a_customers_key_uploads_nothing(scene: Scene) -> None:
    response = await scene.refused(scene.post(files=scene.good, headers=bearer(scene.control.key)))
    assert response.status_code in (401, 403)


async def test_a_length_that_is_not_kept(scene: Scene) -> None:
    """More is declared than is sent: the client hangs up, and its request is over."""
    before = await scene.kept()
    whole = scene.post(files=scene.good)
    body = whole.read()
    head = {**whole.headers, "content-length": str(len(body) + 1000)}
    _, writer = await asyncio.open_connection("127.0.0.1", int(scene.site.url.rsplit(":", 1)[1]))
    lines = [f"POST {URL} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
    writer.write("\r\n".join(lines).encode() + body[:-20])
    await writer.drain()
    async with asyncio.timeout(60):
        while not list((scene.folder / "quarantine").iterdir()):
            await asyncio.sleep(0.005)
        writer.close()
        while await scene.kept() != before:
            await asyncio.sleep(0.005)


async def test_many_at_the_same_time(scene: Scene) -> None:
    before = await scene.kept()
    attacks = [scene.post(**make(scene.good)) for _, make in REQUESTS.values()]
    answers = await asyncio.gather(*map(scene.site.admin.send, attacks))
    assert [one.status_code for one in answers] == [status for (status, _), _ in REQUESTS.values()]
    assert await scene.kept() == before


async def test_afterwards_a_good_upload_is_served(scene: Scene) -> None:
    made = await scene.site.admin.send(scene.post(files=scene.good))
    assert made.status_code == 201, made.text
    assert scene.control.wrong == []
    assert scene.control.answers > 10

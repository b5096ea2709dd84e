"""The examples for nginx and Caddy, run by the real programs: TLS, streams, uploads, clients' addresses."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from server.settings import Settings
from tests.support import nginx, tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.ports import unused
from tests.support.site import ADMIN_KEY, Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")
CONFIG = Path(__file__).parents[3] / "config"
NGINX = nginx.CONFIG.replace(nginx.INSIDE, "include {folder}/loraplex.conf;")
PROGRAMS = {
    "nginx": nginx.NGINX,
    "caddy": shutil.which("caddy") or "/usr/bin/caddy",
}


def certificate(folder: Path) -> tuple[Path, Path]:
    certificate, key = folder / "llm.pem", folder / "llm.key"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return certificate, key


def nginx(folder: Path, port: int, upstream: str, tls: tuple[Path, Path]) -> list[str]:
    text = (CONFIG / "nginx" / "loraplex.conf").read_text()
    for ours, theirs in (
        ("server 127.0.0.1:8000", f"server {upstream}"),
        ("listen 443", f"listen 127.0.0.1:{port}"),
        ("/etc/ssl/llm.example.pem", str(tls[0])),
        ("/etc/ssl/llm.example.key", str(tls[1])),
        ("allow 127.0.0.0/8", "allow 127.0.0.1"),
    ):
        assert text.count(ours) == 1
        text = text.replace(ours, theirs)
    (folder / "loraplex.conf").write_text(text)
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder))
    return ["-c", str(folder / "nginx.conf"), "-p", str(folder), "-e", str(folder / "error.log")]


def caddy(folder: Path, port: int, upstream: str, tls: tuple[Path, Path]) -> list[str]:
    text = (CONFIG / "caddy" / "Caddyfile").read_text()
    for ours, theirs in (
        (
            "\nllm.example {",
            f"\nhttps://localhost:{port}, https://127.0.0.1:{port} {{\n\ttls {tls[0]} {tls[1]}\n",
        ),
        ("reverse_proxy 127.0.0.1:8000", f"reverse_proxy {upstream}"),
        ("remote_ip 127.0.0.0/8", "remote_ip 127.0.0.1"),
    ):
        assert text.count(ours) == 1
        text = text.replace(ours, theirs)
    alone = f"{{\n\tadmin off\n\tauto_https disable_redirects\n\tstorage file_system {folder}/caddy\n}}\n"
    (folder / "Caddyfile").write_text(alone + text)
    return ["run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


@asynccontextmanager
async def behind(program: str, site: Site, folder: Path) -> AsyncIterator[str]:
    """The address of a proxy in front of ``site``."""
    if not Path(PROGRAMS[program]).exists():
        pytest.skip(f"{program} is not installed")
    port, tls = unused(), certificate(folder)
    upstream = urlsplit(site.url).netloc
    words = {"nginx": nginx, "caddy": caddy}[program](folder, port, upstream, tls)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([PROGRAMS[program], *words], stdout=log, stderr=log)
    try:
        url = f"https://localhost:{port}"
        async with client(url, folder) as http, asyncio.timeout(120):
            while True:
                assert process.poll() is None, (folder / "log").read_text()
                try:
                    await http.get("/health")
                    break
                except httpx.TransportError:
                    await asyncio.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def client(url: str, folder: Path, address: str | None = None) -> httpx.AsyncClient:
    """One that trusts the certificate, and comes from ``address``."""
    context = ssl.create_default_context(cafile=str(folder / "llm.pem"))
    transport = httpx.AsyncHTTPTransport(verify=context, local_address=address)
    return httpx.AsyncClient(base_url=url, transport=transport, timeout=60)


@pytest.mark.parametrize(
    ("file", "size"), [("nginx/loraplex.conf", r"(\d+)m;"), ("caddy/Caddyfile", r"(\d+)MiB")]
)
def test_the_largest_upload_fits_through_the_examples(file: str, size: str) -> None:
    """In MiB: Caddy's MB are millions, of which 2,100 are less than 2 GiB."""
    (most,) = re.findall(rf"(?:client_max_body_size|max_size) {size}", (CONFIG / file).read_text())
    assert int(most) << 20 > Settings.model_fields["max_upload_bytes"].default + (1 << 20)


@pytest.mark.parametrize("program", PROGRAMS)
async def test_behind_a_proxy_with_our_example(program: str, tmp_path: Path) -> None:
    engine = FakeEngine(tiny.base(), times=Times(step=0.1))
    async with (
        fake_site(tmp_path / "data", engine, auth_failures=2) as site,
        behind(program, site, tmp_path) as url,
        client(url, tmp_path) as http,
    ):
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        came = 0
        body = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        async with http.stream(
            "POST", "/v1/chat/completions", json=body | {"max_tokens": 400}, headers=bearer(key)
        ) as said:
            async for line in said.aiter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                    came += 1
                    assert engine.running, "it comes token by token, and the last one is made 40 s later"
                if came == 8:
                    break

        uploaded = await http.post(
            "/admin/v1/tenants/acme/adapters/b/versions",
            files={
                n: (tiny.adapter(2) / n).read_bytes()
                for n in ("adapter_config.json", "adapter_model.safetensors")
            },
            headers=bearer(ADMIN_KEY),
        )
        assert uploaded.status_code == 201
        large = await http.post(
            "/admin/v1/tenants/acme/adapters/c/versions",
            files={"adapter_config.json": b"{}", "adapter_model.safetensors": b"\0" * (64 << 20)},
            headers=bearer(ADMIN_KEY),
        )
        assert large.status_code == 422, "the bytes came, and it is Loraplex that refuses them"

        async with (
            client(url, tmp_path, "127.0.0.2") as guessing,
            client(url, tmp_path, "127.0.0.3") as other,
        ):
            forged = bearer("lp-wrong") | {"X-Forwarded-For": "10.0.0.1"}
            codes = [(await guessing.get("/v1/models", headers=forged)).status_code for _ in range(5)]
            assert codes[0] == 401
            assert codes[-1] == 429
            assert (await other.get("/v1/models", headers=forged)).status_code == 401, "another address"
        assert (await http.get("/metrics")).status_code == 200, "from this machine"
        async with client(url, tmp_path, "127.0.0.9") as outside:
            paths = (
                *("/metrics", "/metrics/", "/metrics//", "//metrics"),
                *("/%6detrics", "/metrics%2f", "/v1/../metrics", "/Metrics"),
            )
            codes = {path: (await outside.get(path)).status_code for path in paths}
            assert {codes[path] for path in paths[:3]} == {403}, codes
            assert not any(httpx.codes.is_success(code) for code in codes.values()), codes

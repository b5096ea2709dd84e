"""A real provider of identities (OpenID Connect) for a test, where node and its package are installed."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from html import unescape
from pathlib import Path
from typing import Any

import httpx
import pytest

SCRIPT = Path(__file__).with_suffix(".mjs")
PACKAGES = Path(sys.prefix) / "node"
CLIENT = {"oidc_client_id": "loraplex", "oidc_client_secret": "a-secret-of-the-tests"}


@asynccontextmanager
async def provider(port: int, console: str, people: Mapping[str, Any]) -> AsyncIterator[str]:
    """Its issuer. ``console`` is the address that it leads back to; ``people`` has claims by login."""
    node = shutil.which("node")
    if node is None or not (PACKAGES / "node_modules" / "oidc-provider").is_dir():
        pytest.skip("no provider of identities here; `make install` brings it where there is npm")
    given = {"port": port, "back": f"{console}/oidc/callback", "out": f"{console}/sign-in", "people": people}
    process = await asyncio.create_subprocess_exec(
        node,
        str(SCRIPT),
        str(PACKAGES),
        json.dumps(given),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    while (line := await process.stdout.readline()).strip() != b"ready":
        assert line, "the provider did not start"
    try:
        yield f"http://localhost:{port}"
    finally:
        process.kill()
        await process.wait()


async def consent(client: httpx.AsyncClient, page: httpx.Response, login: str) -> httpx.Response:
    """Fills in the provider's pages as ``login``, and says yes, until they lead back."""
    for _ in range(6):
        while page.is_redirect:
            page = await client.get(page.url.join(page.headers["location"]))
        form = re.search(r'<form[^>]* action="([^"]+)"', page.text)
        if "/interaction/" not in str(page.url) or form is None:
            return page
        kind = "login" if 'name="login"' in page.text else "consent"
        body = {"prompt": kind} | ({"login": login, "password": "any"} if kind == "login" else {})
        page = await client.post(page.url.join(unescape(form[1])), data=body)
    raise AssertionError(f"the provider leads nowhere: {page.text[:500]}")

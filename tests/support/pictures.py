"""Makes the pictures of docs/console.md on the real engine: ``python -m tests.support.pictures`` (minutes).

The demo's model and adapters, with some work, budgets and a canary; Chromium looks at it. With the argument
``fake`` it is the tests' engine.
"""

from __future__ import annotations

import asyncio
import io
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.async_api import Browser, Page, async_playwright, expect

from server.demo.base import base_folder, cache_folder
from server.demo.client import create_customer
from server.demo.process import running, wait_until_ready
from server.demo.run import ADAPTER, ADAPTERS, CUSTOMERS, environment, prepare_base
from tests.support import tiny
from tests.support.browser import chromium, sign_in
from tests.support.fakes import FakeEngine, Times
from tests.support.ports import unused
from tests.support.site import ADMIN_KEY

FOLDER = Path(__file__).parents[2] / "docs" / "images"
MOST_BYTES = 120_000
QUESTIONS = (
    "How do I learn to play the guitar?", "Why is the sky blue?", "Where is my parcel?",
    "What is a good name for a cat?", "How long does an egg boil?",
)  # fmt: skip
SCOPES = ["inference", "adapters:write", "usage:read", "keys:write"]
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 780}


async def work(url: str, keys: dict[str, str], times: int) -> None:
    """Questions of all customers at once, ``times`` of each."""

    async def ask(customer: str, at: int) -> None:
        body = {
            "model": ADAPTER, "stream": True, "max_tokens": 48, "temperature": 0.7,
            "messages": [{"role": "user", "content": QUESTIONS[at % len(QUESTIONS)]}],
        }  # fmt: skip
        answer = await http.post("/v1/chat/completions", json=body, headers=_bearer(keys[customer]))
        if answer.status_code != 429:  # its budget is spent, which is something to look at
            answer.raise_for_status()

    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        await asyncio.gather(*(ask(customer, at) for customer in keys for at in range(times)))


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def furnish(admin: httpx.AsyncClient, url: str, adapters: Path = ADAPTERS) -> dict[str, str]:
    """Customers with adapters, budgets, two versions side by side, and usage; returns a key of each."""
    keys = {name: await create_customer(admin, name, ADAPTER, adapters / name) for name in CUSTOMERS}
    for name, tokens in zip(CUSTOMERS, (4_000, 20_000, 900), strict=True):
        body = {"budgets": {"day": {"tokens": tokens}}, "limits": {"requests_per_minute": 600}}
        (await admin.patch(f"/admin/v1/tenants/{name}", json=body)).raise_for_status()
    first = CUSTOMERS[0]  # whose key is a new one each time
    keys[first] = await create_customer(admin, first, "newsletter", adapters / CUSTOMERS[1])
    await work(url, dict(list(keys.items())[:2]), 4)
    keys[first] = await create_customer(admin, first, ADAPTER, adapters / CUSTOMERS[2])
    adapter = f"/admin/v1/tenants/{first}/adapters/{ADAPTER}"
    (await admin.patch(adapter, json={"split": {"1": 80, "2": 20}})).raise_for_status()
    made = await admin.post(f"/admin/v1/tenants/{first}/keys", json={"name": "website", "scopes": SCOPES})
    keys[first] = made.json()["key"]
    await work(url, keys, 6)
    return keys


async def picture(page: Page, name: str) -> None:
    """As a WebP of at most ``MOST_BYTES``."""
    found = Image.open(io.BytesIO(await page.screenshot()))
    for quality in range(85, 20, -10):
        found.convert("RGB").save(FOLDER / name, "WEBP", quality=quality, method=6)
        if (FOLDER / name).stat().st_size <= MOST_BYTES:
            break
    print(f"{name}: {(FOLDER / name).stat().st_size / 1000:.0f} kB")


async def opened(browser: Browser, url: str, key: str, **options: Any) -> Page:
    context = await browser.new_context(base_url=url, timezone_id="UTC", locale="en-GB", **options)
    page = await context.new_page()
    page.set_default_timeout(120_000)
    await sign_in(page, key)
    return page


async def look(url: str, admin_key: str, keys: dict[str, str]) -> None:
    acme = f"/console/customers/{CUSTOMERS[0]}"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        light = await opened(browser, url, admin_key, viewport=WIDE)
        busy = asyncio.create_task(work(url, keys, 8))
        await expect(light.locator(".tile.running").first).to_be_visible(timeout=60_000)
        await asyncio.sleep(3)  # until there is a rate
        await expect(light.locator(".tile.running").first).to_be_visible(timeout=60_000)
        await picture(light, "fleet.webp")
        await busy
        for name, path in (
            ("customers", "/console/customers"), ("requests", "/console/requests"),
            ("usage", "/console/usage?by=adapter&days=1"), ("audit", "/console/audit"),
        ):  # fmt: skip
            await light.goto(path)
            await picture(light, f"{name}.webp")
        await light.goto(f"/console/playground?tenant={CUSTOMERS[0]}&model={ADAPTER}@2")
        await light.get_by_role("button", name="Make a key for an hour").click()
        await light.get_by_label("Most tokens").fill("24")
        await light.locator("textarea[name=prompt]").fill(QUESTIONS[0])
        await light.get_by_role("button", name="Ask", exact=True).click()
        for at in range(3):
            answer = light.locator(".answer").nth(at)
            await expect(answer.locator(".figures-line")).to_contain_text("first token", timeout=120_000)
            if await answer.get_by_text("Token by token").is_visible():
                await answer.get_by_text("Token by token").click()
        await light.locator(".answers").evaluate("(place) => place.scrollIntoView()")
        await picture(light, "playground.webp")
        tall = {**WIDE, "height": 1250}
        dark = await opened(browser, url, admin_key, viewport=tall, color_scheme="dark")
        await dark.goto(f"{acme}/adapters/{ADAPTER}")
        await picture(dark, "adapter.webp")
        phone = await opened(browser, url, keys[CUSTOMERS[0]], viewport=PHONE)
        await picture(phone, "home-phone.webp")
        await browser.close()


async def main() -> None:
    cache = cache_folder()
    await prepare_base(cache)
    key, port = secrets.token_urlsafe(32), unused()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as data:
        env = environment(base_folder(cache), Path(data), port, key)
        log = Path(data) / "server.log"
        command = [sys.executable, "-m", "server", "serve"]
        async with (
            running(command, env, log) as server,
            httpx.AsyncClient(base_url=url, timeout=300, headers=_bearer(key)) as admin,
        ):
            await wait_until_ready(server, admin, log)
            await look(url, key, await furnish(admin, url))


async def on_the_fake() -> None:
    """All but the playground, whose answers need a model."""
    engine = FakeEngine(tiny.base(), gpu_slots=4, host_slots=8, times=Times(step=0.05, stage=0.05))
    with tempfile.TemporaryDirectory() as work:
        adapters = Path(work) / "adapters"
        adapters.mkdir()
        for seed, name in enumerate(CUSTOMERS, 1):
            (adapters / name).symlink_to(tiny.adapter(seed))
        async with tiny.fake_site(Path(work) / "data", engine, gpu_slots=4, host_slots=8) as site:
            await look(site.url, ADMIN_KEY, await furnish(site.admin, site.url, adapters))
    (FOLDER / "playground.webp").unlink()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    asyncio.run(on_the_fake() if sys.argv[1:] == ["fake"] else main())

"""The console in a real Chromium: each page and each action, as people use them."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Page, Route, expect

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from tests.service.console.test_sign_in import CUSTOMER, OPERATOR, full_key
from tests.support import tiny
from tests.support.browser import browsing, follow, loading, sign_in
from tests.support.site import ADMIN_KEY, Site
from tests.support.tiny import fake_site


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path) as site:
        yield site


def files_of(seed: int) -> list[Path]:
    folder = tiny.adapter(seed)
    return [folder / CONFIG_FILE, folder / WEIGHTS_FILE]


async def confirm(page: Page) -> None:
    """What was asked loads the page anew."""
    async with loading(page):
        await page.get_by_role("button", name="Go on").click()


async def press(page: Page, name: str) -> None:
    """A button that leads to a page, or loads this one anew once it has its answer."""
    async with loading(page):
        await page.get_by_role("button", name=name).click()


async def test_an_operator_from_a_new_customer_to_its_usage(site: Site) -> None:
    async with browsing(site.url) as page:
        await page.goto("/console")
        await page.get_by_label("Key").fill("wrong-key")
        await press(page, "Sign in")
        await expect(page.get_by_role("alert")).to_contain_text("not valid here")
        await sign_in(page, ADMIN_KEY)
        await expect(page.get_by_role("heading", name="Fleet")).to_be_visible()
        for name in ("Customers", "Adapters", "Requests", "Usage", "Audit", "Playground", "Fleet"):
            await follow(page, name)
            await expect(page.get_by_role("heading", name=name, level=1)).to_be_visible()

        await follow(page, "Customers")
        await page.get_by_role("button", name="New customer").click()
        await page.get_by_label("Id", exact=True).fill("acme")
        await press(page, "Create")
        await expect(page.get_by_role("heading", name="acme", level=1)).to_be_visible()

        await page.get_by_role("button", name="Upload").click()
        await page.get_by_label("Name", exact=True).last.fill("support")
        await page.locator("#upload input[type=file]").set_input_files(files_of(1))
        await expect(page.locator("#upload .files li")).to_have_count(2)
        async with loading(page):
            await page.locator("#upload").get_by_role("button", name="Upload").click()
        await follow(page, "support")
        await expect(page.get_by_role("heading", name="What it changes")).to_be_visible()
        await expect(page.locator(".heat-cell")).to_have_count(2)
        await expect(page.get_by_text("it changes answers")).to_be_visible()

        await follow(page, "acme", exact=False)
        await page.get_by_role("button", name="New key").click()
        await page.locator("#new-key").get_by_label("Name").fill("backend")
        await page.get_by_role("button", name="Create").click()
        await expect(page.locator("#secret")).to_be_visible()
        key = await page.locator("#secret .secret").inner_text()
        answered = await site.chat(key, "hi", model="support", max_tokens=3)
        assert answered.status_code == 200
        await press(page, "Done")
        await expect(page.get_by_role("cell", name="backend")).to_be_visible()
        assert key not in await page.content()

        await follow(page, "Requests")
        row = page.get_by_role("row").filter(has_text="support@1")
        await expect(row).to_contain_text("completed")
        async with loading(page):
            await row.get_by_role("link").click()
        await expect(page.get_by_role("heading", name="This request")).to_be_visible()
        await follow(page, "Usage")
        await expect(page.locator("figure.chart")).to_be_visible()
        await follow(page, "Audit")
        await expect(page.get_by_role("row").filter(has_text="key.create")).to_be_visible()

        await follow(page, "Customers")
        await follow(page, "acme", exact=False)
        await page.get_by_role("row").filter(has_text="backend").get_by_role("button", name="Revoke").click()
        await confirm(page)
        await expect(page.get_by_text("There is no key yet.")).to_be_visible()
        assert (await site.chat(key, "hi", model="support")).status_code == 401
        await press(page, "Sign out")
        await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


async def test_a_refused_upload_says_what_to_do(site: Site, tmp_path: Path) -> None:
    key = await full_key(site, "acme")
    config, weights = files_of(2)
    broken = tmp_path / CONFIG_FILE
    broken.write_text(config.read_text().replace('"LORA"', '"IA3"'))
    async with browsing(site.url) as page:
        await sign_in(page, key)
        await follow(page, "Adapters")
        await page.get_by_role("button", name="Upload").click()
        await page.get_by_label("Name", exact=True).fill("new")
        form = page.locator("#upload")
        await form.locator("input[type=file]").set_input_files([broken])
        await form.get_by_role("button", name="Upload").click()
        await expect(form.get_by_role("alert")).to_contain_text(WEIGHTS_FILE)
        await form.locator("input[type=file]").set_input_files([broken, weights])
        await form.get_by_role("button", name="Upload").click()
        await expect(form.get_by_role("alert")).to_contain_text("IA3")
        await expect(form.get_by_role("alert")).to_contain_text("Code: ")
        await form.locator("input[type=file]").set_input_files([config, weights])
        async with loading(page):
            await form.get_by_role("button", name="Upload").click()
        await follow(page, "new")
        row = page.get_by_role("row").filter(has_text="IA3")
        await expect(row.locator("code")).to_have_text("not_lora")


async def test_versions_go_live_share_requests_and_go(site: Site) -> None:
    key = await full_key(site, "acme")
    await site.upload("acme", "support", tiny.adapter(2))
    async with browsing(site.url) as page:
        await sign_in(page, key)
        await page.goto("/console/adapters/support")
        rows = page.get_by_role("row")
        await expect(rows.filter(has_text="@2").first).to_contain_text("live")
        await rows.filter(has_text="@1").get_by_role("button", name="Go live").click()
        await confirm(page)
        await expect(rows.filter(has_text="@1").locator(".badge.good", has_text="live")).to_be_visible()
        await page.get_by_label("gets, %").fill("25")
        await press(page, "Divide requests")
        await expect(page.get_by_role("button", name="End the canary")).to_be_visible()
        await expect(page.get_by_text("end the canary, and a version can be rolled out")).to_be_visible()
        found = (await site.admin.get("/admin/v1/tenants/acme/adapters/support")).json()
        assert found["split"] == {"1": 75, "2": 25}
        await page.get_by_role("button", name="End the canary").click()
        await confirm(page)
        await expect(page.get_by_role("button", name="End the canary")).to_have_count(0)
        await rows.filter(has_text="@2").get_by_role("button", name="Delete").click()
        await confirm(page)
        await expect(rows.filter(has_text="@2")).to_have_count(0)
        found = (await site.admin.get("/admin/v1/tenants/acme/adapters/support")).json()
        assert (found["live"], len(found["versions"]), found["split"]) == (1, 1, None)

        await page.get_by_role("button", name="Upload").click()
        form = page.locator("#upload")
        await form.locator("input[type=file]").set_input_files(files_of(3))
        await form.get_by_label("Start a rollout").check()
        # The page says so for 0.6 s, and then loads itself anew, here when it has been read.
        await page.evaluate("window.setTimeout = (later) => { window.later = later; }")
        await form.get_by_role("button", name="Upload").click()
        await expect(form.get_by_role("status").first).to_contain_text("its rollout has begun")
        async with loading(page):
            await page.evaluate("window.later()")
        await expect(page.get_by_role("button", name="Roll back")).to_be_visible()
        found = (await site.admin.get("/admin/v1/tenants/acme/adapters/support")).json()
        listed = (await site.admin.get("/admin/v1/tenants/acme/adapters/support/rollouts")).json()["data"]
        assert found["live"] == 1
        assert [(one["state"], one["version"]) for one in listed] == [
            ("running", found["versions"][-1]["version"])
        ]


async def test_the_playground_streams_and_compares(site: Site) -> None:
    key = await full_key(site, "acme")
    await site.upload("acme", "support", tiny.adapter(2))
    async with browsing(site.url) as page:
        await sign_in(page, key)
        await page.goto("/console/playground?model=support@2")
        answers = page.locator(".answer")
        await page.get_by_role("button", name="Ask").click()
        for at in range(3):
            await expect(answers.nth(at).locator(".figures-line")).to_contain_text("first token")
            assert (await answers.nth(at).locator(".said").inner_text()).strip()
        await page.get_by_text("The same in code").click()
        await expect(page.locator("[data-snippet=openai]")).to_contain_text(f'base_url="{site.url}/v1"')
        await expect(page.locator("[data-snippet=curl]")).to_contain_text("/v1/chat/completions")


def said(*tokens: tuple[str, float, dict[str, float]]) -> str:
    """A stream with these tokens, their log-probabilities, and those of the likeliest others."""
    events = [
        {"choices": [{"index": 0, "delta": {"content": token}, "logprobs": {"content": [
            {"token": token, "logprob": own,
             "top_logprobs": [{"token": name, "logprob": value} for name, value in top.items()]},
        ]}}]}
        for token, own, top in tokens
    ]  # fmt: skip
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


STREAMS = {
    tiny.NAME: said(
        ("The", -0.5, {"The": -0.5}), (" sky", -1.0, {" sky": -1.0, " sea": -1.25}), (" is", -0.1, {})
    ),
    "support@2": said(("The", -0.25, {}), (" sea", -0.5, {}), (" is", -0.2, {})),
    "support@1": said(("The", -0.5, {}), (" <b>", -0.75, {})),
}


async def test_the_playground_tells_differences_token_by_token(site: Site) -> None:
    """Of what an engine's log-probabilities come to; the fake has none in chats."""
    key = await full_key(site, "acme")
    await site.upload("acme", "support", tiny.adapter(2))

    async def answer(route: Route) -> None:
        body = STREAMS[route.request.post_data_json["model"]]
        await route.fulfill(body=body, content_type="text/event-stream")

    async with browsing(site.url) as page:
        await sign_in(page, key)
        await page.route("**/console/api/v1/chat/completions", answer)
        await page.goto("/console/playground?model=support@2")
        await page.get_by_role("button", name="Ask").click()
        places, tables = page.locator(".answer"), []
        for at, count in enumerate((3, 3, 2)):
            await places.nth(at).get_by_text("Token by token").click()
            await expect(places.nth(at).locator(".tokens tbody tr")).to_have_count(count)
            rows = await places.nth(at).locator(".tokens tbody tr").all()
            tables.append([await row.locator("td").all_inner_texts() for row in rows])
        assert tables == [
            [["1", "The", "-0.500"], ["2", " sky", "-1.000"], ["3", " is", "-0.100"]],
            [["1", "The", "-0.250", "+0.250"], ["2", " sea", "-0.500", "+0.750"], ["3", " is", "-0.200", ""]],
            [["1", "The", "-0.500", "+0.000"], ["2", " <b>", "-0.750", "not among its 5"]],
        ]
        parted = "parts from the first model at token 2, mean difference 0.500 over 2 tokens"
        await expect(places.nth(1).locator(".figures-line")).to_contain_text(parted)


async def test_fleet_is_live_and_the_session_ends_everywhere(site: Site) -> None:
    key = await full_key(site, "acme")
    async with browsing(site.url) as page:
        await sign_in(page, ADMIN_KEY)
        await site.chat(key, "hi", model="support")
        await expect(page.locator(".tile").filter(has_text="support")).to_be_visible(timeout=60_000)
        await page.context.clear_cookies()
        await expect(page.get_by_role("heading", name="Sign in")).to_be_visible(timeout=60_000)


# What a page is like in other colours and in another layout: its elements are the same.
SEEN = ["color-contrast", "link-in-text-block", "scrollable-region-focusable"]
WIDE, NARROW = {"width": 1280, "height": 720}, {"width": 390, "height": 800}


async def everybodys(page: Page, how: str) -> list[str]:
    """What axe finds serious on a page as it is now, by all its rules where it is light and wide; and whether
    it is wider than the window. Each begins with ``how``."""
    asked: dict[str, Any] = {"resultTypes": ["violations"]}
    if how != "light":
        asked["runOnly"] = {"type": "rule", "values": SEEN}
    result = (await Axe().run(page, options=asked)).response
    looked = {one["id"] for one in result["passes"]}
    assert "color-contrast" in looked, "axe did not look"
    assert how != "light" or len(looked) > 10, "axe did not look"
    found = [
        f"{how}: {one['id']} {one['nodes'][0]['target']}"
        for one in result["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    width = await page.evaluate("document.documentElement.scrollWidth - innerWidth")
    return found + ([f"{how}: {width} px too wide"] if width > 0 else [])


@pytest.mark.parametrize("who", ["operator", "customer"])
async def test_everybody_can_use_every_page(site: Site, who: str) -> None:
    """Light, dark and on a phone, whose layout follows the window."""
    key = await full_key(site, "acme")
    await site.upload("acme", "support", tiny.adapter(2))
    for seed in (3, 4):
        await site.upload("acme", "rolling", tiny.adapter(seed))
    rolling = "/admin/v1/tenants/acme/adapters/rolling/rollouts"
    assert (await site.admin.post(rolling, json={"version": 1})).status_code == 201
    await site.admin.patch("/admin/v1/tenants/acme", json={"budgets": {"day": {"tokens": 1000}}})
    await site.chat(key, "hi", model="support", max_tokens=3)
    also = "/customers/acme/adapters/rolling"
    signed, paths = (ADMIN_KEY, (*OPERATOR, also)) if who == "operator" else (key, CUSTOMER)
    found = []
    async with browsing(site.url) as page:
        await sign_in(page, signed)
        for path in paths:
            if path == "/fleet/live":
                continue
            await page.emulate_media(color_scheme="light")
            await page.set_viewport_size(WIDE)
            await page.goto(f"/console{path}")
            told = await everybodys(page, "light")
            await page.emulate_media(color_scheme="dark")
            told += await everybodys(page, "dark")
            await page.emulate_media(color_scheme="light")
            await page.set_viewport_size(NARROW)
            told += await everybodys(page, "phone")
            found += [f"{path} {one}" for one in told]
    assert found == []


async def test_a_keyboard_is_enough(site: Site) -> None:
    async with browsing(site.url) as page:
        await page.goto("/console")
        await expect(page.get_by_role("textbox", name="Key")).to_be_focused()  # without a click
        await page.keyboard.type(ADMIN_KEY)
        async with loading(page):
            await page.keyboard.press("Enter")
        await expect(page.get_by_role("heading", name="Fleet")).to_be_visible()
        await page.keyboard.press("Tab")
        await expect(page.get_by_text("Skip to content")).to_be_focused()
        for _ in range(2):
            await page.keyboard.press("Tab")
        await page.keyboard.press("Tab")
        await page.keyboard.press("Enter")
        await expect(page).to_have_url(re.compile("/console/(adapters|customers)$"))

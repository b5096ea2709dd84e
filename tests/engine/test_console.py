"""The console in a real Chromium, on the real engine: from an upload to answers side by side."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.async_api import expect

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from tests.engine.reference import ATTENTION, MLP, Reference, Spec
from tests.support.browser import browsing, follow, loading, sign_in
from tests.support.site import ADMIN_KEY, Site

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]


async def test_an_upload_is_probed_shown_and_asked(site: Site, reference: Reference, tmp_path: Path) -> None:
    folder = reference.make(Spec(seed=81, rank=8, targets=ATTENTION + MLP), tmp_path / "adapter")
    await site.tenant("viewer")
    async with browsing(site.url) as page:
        await sign_in(page, ADMIN_KEY)
        await page.goto("/console/customers/viewer")
        await page.get_by_role("button", name="Upload").click()
        upload = page.locator("#upload")
        await upload.get_by_label("Name", exact=True).fill("voice")
        await upload.locator("input[type=file]").set_input_files(
            [folder / CONFIG_FILE, folder / WEIGHTS_FILE]
        )
        async with loading(page):
            await upload.get_by_role("button", name="Upload").click()
        await follow(page, "voice")
        await expect(page.get_by_text("it changes answers")).to_be_visible()
        layers = len(reference.model.model.layers)
        await expect(page.locator(".heat-cell")).to_have_count(layers * len(ATTENTION + MLP))

        await follow(page, "Try it in the playground")
        async with loading(page):
            await page.get_by_role("button", name="Make a key for an hour").click()
        answers = page.locator(".answer")
        await expect(answers.nth(1).get_by_label("Model")).to_have_value("voice@1")
        await page.get_by_label("Most tokens").fill("12")
        await page.get_by_role("button", name="Ask", exact=True).click()
        for at in range(2):
            figures = answers.nth(at).locator(".figures-line")
            await expect(figures).to_contain_text(re.compile("[1-9][0-9]* tokens"), timeout=120_000)
            assert 1 <= await answers.nth(at).locator(".said span").count() <= 12
        said = [await answers.nth(at).locator(".said").inner_text() for at in range(2)]
        assert said[0] != said[1]
        await expect(answers.nth(1).locator(".figures-line")).to_contain_text("parts from the first model")
        await answers.nth(1).get_by_text("Token by token").click()
        rows = answers.nth(1).locator(".tokens tbody tr")
        await expect(rows).to_have_count(await answers.nth(1).locator(".said span").count())
        # Both were given the same up to the first token that differs.
        await expect(rows.first).to_contain_text(re.compile("[+\u2212][0-9]+[.][0-9]{3}|not among its 5"))
        figures = await answers.nth(1).locator(".figures-line").inner_text()
        parted = int(re.findall("at token ([0-9]+)", figures)[0])
        told = [text for text in await rows.locator("td:nth-child(4)").all_inner_texts() if text]
        assert len(told) == parted

        await follow(page, "Fleet")
        await expect(page.locator(".tile").filter(has_text="voice")).to_be_visible()
        await follow(page, "Requests")
        await expect(page.get_by_role("row").filter(has_text="voice@1").first).to_contain_text("completed")

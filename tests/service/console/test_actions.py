"""What test_browser.py leaves out: every other action of the pages, each dialog by keyboard, errors and empty
pages, in a real Chromium."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Locator, Page, expect

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from server.publishing.quarantine import quarantine
from tests.service.console.test_sign_in import full_key
from tests.service.publishing.test_golden import trained, upload
from tests.support import tiny
from tests.support.browser import browsing, follow, loading, sign_in
from tests.support.site import ADMIN_KEY, Site
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")
ACME = "/admin/v1/tenants/acme"
# Puts files into an element as a hand does that lets them go above it.
DROP = """(zone, files) => {
  const carried = new DataTransfer();
  for (const [name, bytes] of files)
    carried.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name));
  for (const kind of ["dragover", "drop"])
    zone.dispatchEvent(new DragEvent(kind, { dataTransfer: carried, bubbles: true, cancelable: true }));
}"""


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path) as site:
        yield site


async def press(where: Page | Locator, name: str, *, sure: Page | None = None) -> None:
    """Presses a button, and what asks whether one is sure, where there is ``sure``'s dialog for that."""
    await where.get_by_role("button", name=name, exact=True).click()
    if sure is not None:
        await press(sure.locator("#confirm"), "Go on")


async def change(page: Page, name: str, *, within: Locator | None = None, sure: bool = False) -> None:
    """The same with a button that leads to a page, or loads this one anew once it has its answer."""
    async with loading(page):
        await press(within or page, name, sure=page if sure else None)


async def found(site: Site, path: str) -> Any:
    answer = await site.admin.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def customer(page: Page, site: Site) -> None:
    """Its fields, its suspension."""
    await page.goto("/console/customers/acme")
    await press(page, "Change")
    edit = page.locator("#edit")
    await edit.get_by_label("Name").fill("Acme Corporation")
    await edit.get_by_label("Weight").fill("2.5")
    await edit.get_by_label("Priority").select_option("interactive")
    await edit.get_by_label("Requests a minute").fill("600")
    await change(page, "Save", within=edit)
    await expect(page.get_by_text("requests per minute")).to_be_visible()
    shown = await found(site, ACME)
    assert (shown["name"], shown["weight"], shown["priority"]) == ("Acme Corporation", 2.5, "interactive")
    assert shown["limits"]["requests_per_minute"] == 600
    await change(page, "Suspend", sure=True)
    await expect(page.get_by_role("heading", name="acme suspended")).to_be_visible()
    assert (await found(site, ACME))["suspended"] is True
    await change(page, "Lift suspension")
    await expect(page.get_by_role("button", name="Suspend", exact=True)).to_be_visible()


async def one_adapter(page: Page, site: Site) -> None:
    """What is done to an adapter as a whole, and to a version."""
    where = f"{ACME}/adapters/a"
    await page.goto("/console/customers/acme/adapters/a")
    await change(page, "Pin")
    await expect(page.get_by_role("button", name="Unpin")).to_be_visible()
    await change(page, "Unpin")
    await expect(page.get_by_role("button", name="Pin", exact=True)).to_be_visible()
    await change(page, "Make default")
    await expect(page.get_by_role("button", name="Make default")).to_have_count(0)
    shown = await found(site, where)
    assert (shown["pinned"], shown["default"]) == (False, True)
    async with page.expect_response("**/verify*") as asked:
        await change(page, "Verify now")
    assert (await asked.value).status == 200
    await expect(page.get_by_text("as in training")).to_be_visible()
    version = await site.services.publishing.catalog.version("acme", "a", 1)
    await quarantine(site.services.publishing.quarantine, site.services.dispatcher, version, "it made NaN")
    await page.reload()
    await expect(page.get_by_text("Out of service.")).to_be_visible()
    await change(page, "Release", sure=True)
    await expect(page.get_by_text("quarantined", exact=True)).to_have_count(0)


async def rollout(page: Page, site: Site) -> None:
    await change(page, "Roll it out")
    await change(page, "Pause")
    await expect(page.locator(".badge", has_text="held")).to_be_visible()
    await change(page, "Resume")
    await expect(page.get_by_role("button", name="Pause", exact=True)).to_be_visible()
    await change(page, "Next step", sure=True)
    await expect(page.get_by_role("listitem").filter(has_text="forward").first).to_be_visible()
    await change(page, "Roll back", sure=True)
    await expect(page.get_by_text("rolled back", exact=True).first).to_be_visible()
    listed = (await found(site, f"{ACME}/adapters/a/rollouts"))["data"]
    assert [one["state"] for one in listed] == ["rolled_back"]


async def lists(page: Page, key: str) -> None:
    """Searches, a file of the usage, and pages with nothing on them."""
    await page.goto("/console/requests")
    await page.get_by_label("Outcome").select_option("completed")
    await page.get_by_label("Adapter").fill("support")
    await change(page, "Search")
    await expect(page.locator("tbody tr")).to_have_count(1)
    await page.get_by_label("Customer").fill("nobody")
    await change(page, "Search")
    await expect(page.get_by_text("No request is like that.")).to_be_visible()
    await page.goto("/console/usage?days=1")
    async with page.expect_download() as download:
        await page.get_by_role("link", name="CSV").click()
    text = Path(str(await (await download.value).path())).read_text()
    assert {"hour", "tenant", "requests"} < set(text.splitlines()[0].split(","))
    assert key not in text
    await page.goto("/console/audit")
    await page.get_by_label("What").fill("tenant.update")
    await change(page, "Search")
    await expect(page.locator("tbody tr").first).to_contain_text("tenant.update")
    for path, field, text in (
        ("adapters", "q", "No adapter is like that."),
        ("customers", "q", "No customer has this in its name."),
    ):
        await page.goto(f"/console/{path}?{field}=zzz")
        await expect(page.get_by_text(text)).to_be_visible()


async def operators_playground(page: Page) -> None:
    """A customer's version beside another one and the base, with a key that the console makes for it."""
    await page.goto("/console/customers/acme/adapters/a?version=2")
    await follow(page, "Try it in the playground")
    await change(page, "Make a key for an hour")
    answers = page.locator(".answer")
    chosen = [await answers.nth(at).get_by_label("Model").input_value() for at in range(3)]
    assert chosen == [tiny.NAME, "a@2", "a@1"]
    await press(page, "Ask")
    for at in range(3):
        await expect(answers.nth(at).locator(".figures-line")).to_contain_text("first token")


async def by_hand(page: Page, site: Site) -> None:
    """Files that are dropped; a whole adapter, and then its customer, that go."""
    await page.goto("/console/customers/acme")
    await press(page, "Upload")
    folder = tiny.adapter(3)
    dropped = [
        [name, base64.b64encode((folder / name).read_bytes()).decode()]
        for name in (CONFIG_FILE, WEIGHTS_FILE)
    ]
    dialog = page.locator("#upload")
    await dialog.get_by_label("Name", exact=True).fill("dropped")
    await dialog.locator(".dropzone").evaluate(DROP, dropped)
    await expect(dialog.locator(".files li")).to_have_count(2)
    async with page.expect_response(lambda answer: "/versions" in answer.url) as sent:
        await change(page, "Upload", within=dialog)
    assert (await sent.value).status == 201
    await follow(page, "dropped")
    await change(page, "Delete", sure=True)
    await expect(page.get_by_role("heading", name="acme", level=1)).to_be_visible()
    await expect(page.get_by_role("link", name="dropped")).to_have_count(0)
    await change(page, "Delete", sure=True)
    await expect(page.get_by_role("heading", name="Customers", level=1)).to_be_visible()
    assert (await site.admin.get(ACME)).status_code == 404


async def own_keys(page: Page, site: Site, key: str) -> None:
    """A customer makes a key, which is shown once, and revokes it."""
    await sign_in(page, key)
    await follow(page, "Keys")
    await press(page, "New key")
    new = page.locator("#new-key")
    await new.get_by_label("Name").fill("laptop")
    await new.get_by_label("upload and change adapters").check()
    await press(new, "Create")
    await expect(page.locator("#secret")).to_be_visible()
    made = await page.locator("#secret .secret").inner_text()
    await press(page.locator("#secret"), "Copy")
    await expect(page.locator("#secret").get_by_role("status")).to_be_visible()
    async with loading(page):
        await page.keyboard.press("Escape")
    row = page.get_by_role("row").filter(has_text="laptop")
    await expect(row).to_contain_text("inference, adapters:write")
    assert made not in await page.content()
    assert (await site.chat(made, "hi", model="a")).status_code == 200
    await change(page, "Revoke", within=row, sure=True)
    await expect(row).to_have_count(0)
    assert (await site.chat(made, "hi", model="a")).status_code == 401
    await change(page, "Sign out")


async def test_every_other_action(site: Site) -> None:
    key = await full_key(site, "acme")
    assert (await upload(site, await trained(site))).status_code == 201
    await site.upload("acme", "a", tiny.adapter(2))
    await site.admin.patch(f"{ACME}/adapters/a", json={"live": 1})
    assert (await site.chat(key, "hi", model="a")).status_code == 200
    assert (await site.chat(key, "hi", model="support")).status_code == 200
    async with browsing(site.url) as page:
        await own_keys(page, site, key)
        await sign_in(page, ADMIN_KEY)
        await customer(page, site)
        await one_adapter(page, site)
        await rollout(page, site)
        await lists(page, key)
        await operators_playground(page)
        await by_hand(page, site)


# --- without a mouse ------------------------------------------------------------------------------------


async def serious(page: Page, what: str) -> Sequence[str]:
    """What axe finds of the page as it is now."""
    result = (await Axe().run(page, options={"resultTypes": ["violations"]})).response
    assert len(result["passes"]) > 5, "axe did not look"
    return [
        f"{what}: {one['id']} {one['nodes'][0]['target']}"
        for one in result["violations"]
        if one["impact"] in ("serious", "critical")
    ]


async def by_keyboard(page: Page, button: Locator, dialog: Locator) -> Sequence[str]:
    """Opens ``dialog``, goes once around in it, and leaves it, back to ``button``; what axe finds in it."""
    await button.focus()
    await page.keyboard.press("Enter")
    await expect(dialog).to_be_visible()
    name = str(await dialog.get_attribute("id"))
    assert await dialog.get_attribute("aria-labelledby"), name
    fields = await dialog.locator("input:not([type=hidden]), select, button").count()
    inside = "(dialog) => dialog.contains(document.activeElement) || document.activeElement === document.body"
    for _ in range(fields + 2):
        assert await dialog.evaluate(inside), f"the focus left {name}"
        await page.keyboard.press("Tab")
    faults = await serious(page, name)
    await page.keyboard.press("Escape")
    await expect(dialog).to_be_hidden()
    await expect(button).to_be_focused()
    return faults


async def test_each_dialog_and_each_error_without_a_mouse(site: Site) -> None:
    faults: list[str] = []
    await full_key(site, "acme")
    async with browsing(site.url) as page:
        await page.goto("/console")
        faults += await serious(page, "sign-in")
        await page.get_by_label("Key").fill("wrong-key")
        async with loading(page):
            await page.keyboard.press("Enter")
        await expect(page.get_by_role("alert")).to_be_visible()
        faults += await serious(page, "a wrong key")
        await sign_in(page, ADMIN_KEY)
        for path, opens in (
            ("customers", {"New customer": "new-customer"}),
            (
                "customers/acme",
                {"Change": "edit", "Upload": "upload", "New key": "new-key", "Suspend": "confirm"},
            ),
        ):
            await page.goto(f"/console/{path}")
            for name, dialog in opens.items():
                button = page.get_by_role("button", name=name, exact=True).first
                faults += await by_keyboard(page, button, page.locator(f"#{dialog}"))
        assert (await found(site, ACME))["suspended"] is False, "Escape says no"
        for path, text in (
            ("customers/nobody", "not_found"),
            ("nowhere", "Not found"),
            ("requests?slower_than=soon", "That did not work"),
        ):
            await page.goto(f"/console/{path}")
            await expect(page.get_by_text(text).first).to_be_visible()
            faults += await serious(page, path)
        await site.admin.delete(ACME)
        for path in ("", "customers", "adapters", "requests?tenant=nobody", "usage", "playground"):
            await page.goto(f"/console/{path}")
            await expect(page.locator(".empty").first).to_be_visible()
            faults += await serious(page, f"{path} with nothing on it")
    assert faults == []

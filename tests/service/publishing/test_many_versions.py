"""An adapter with very many versions costs its customer alone: reports are read where they are shown."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from tests.service.http.test_api import error
from tests.support import tiny
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site

ADAPTERS = "/admin/v1/tenants/acme/adapters"
# The column by itself; what is taken out of it by the database has a parenthesis before it.
WHOLE_REPORT = re.compile(r"SELECT [^;]*?(?<!\()versions\.report\b[^;]*? FROM")


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path, max_versions=4) as site:
        yield site


async def copy_first(site: Site, numbers: range) -> None:
    """Version 1 of ``a`` again under ``numbers``, as if it had been uploaded as often."""
    async with site.services.database.write() as session:
        columns = [row[1] for row in (await session.execute(text("PRAGMA table_info(versions)"))).all()]
        for number in numbers:
            taken = ", ".join(str(number) if column == "number" else column for column in columns)
            made = (
                f"INSERT INTO versions ({', '.join(columns)}) SELECT {taken} FROM versions WHERE number = 1"
            )
            await session.execute(text(made))
        await session.execute(text(f"UPDATE adapters SET next_version = {numbers.stop}"))


@contextmanager
def statements(site: Site) -> Iterator[list[str]]:
    engine = site.services.database._engine.sync_engine
    seen: list[str] = []

    def note(_: Any, __: Any, statement: str, *more: Any) -> None:
        seen.append(" ".join(statement.split()))

    event.listen(engine, "before_cursor_execute", note)
    yield seen
    event.remove(engine, "before_cursor_execute", note)


async def test_no_report_is_read_where_none_is_shown(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    assert WHOLE_REPORT.search("SELECT a, versions.report AS r FROM versions"), "this is what it looks for"
    with statements(site) as seen:
        assert (await site.upload("acme", "a", tiny.adapter(2))).status_code == 201
        assert (await site.upload("acme", "a", tiny.adapter(1))).status_code == 201
        assert (await site.http.get("/v1/models", headers=bearer(key))).status_code == 200
        for model in ("a", "a@2"):
            assert (await site.chat(key, "hi", model=model)).status_code == 200
        assert (await site.admin.post(f"{ADAPTERS}/a/warm", json={"version": 1})).status_code == 200
        await site.services.publishing.quarantine.check("acme", "0" * 64)
        assert (await site.admin.delete(f"{ADAPTERS}/a")).status_code == 204
    assert any("FROM versions" in statement for statement in seen)
    assert [statement for statement in seen if WHOLE_REPORT.search(statement)] == []


async def test_one_version_more_than_an_adapter_may_have(site: Site) -> None:
    await site.tenant("acme", {"a": tiny.adapter(1)})
    await copy_first(site, range(2, 5))
    refused = error(await site.upload("acme", "a", tiny.adapter(2)), 409, "too_many_versions")
    assert "has 4 versions, and may have 4" in refused["message"]
    assert "keep_versions" in refused["message"], "the cure"
    assert (await site.upload("acme", "b", tiny.adapter(2))).status_code == 201, "of that adapter alone"
    assert (await site.admin.delete(f"{ADAPTERS}/a/versions/2")).status_code == 204
    assert (await site.upload("acme", "a", tiny.adapter(2))).json()["version"] == 5


@pytest.mark.parametrize(("keep", "status"), [(0, 409), (2, 201), (4, 201), (5, 409)])
async def test_who_has_the_oldest_removed_is_not_refused(site: Site, keep: int, status: int) -> None:
    await site.tenant("acme", {"a": tiny.adapter(1)})
    await copy_first(site, range(2, 5))
    assert (await site.admin.patch(f"{ADAPTERS}/a", json={"keep_versions": keep})).status_code == 200
    assert (await site.upload("acme", "a", tiny.adapter(2))).status_code == status


async def test_an_upload_that_is_repeated_with_its_key_is_answered_as_before(site: Site) -> None:
    await site.tenant("acme", {"a": tiny.adapter(1)})
    await copy_first(site, range(2, 4))
    files = {
        n: (tiny.adapter(2) / n).read_bytes() for n in ("adapter_config.json", "adapter_model.safetensors")
    }
    ask = {"url": f"{ADAPTERS}/a/versions", "files": files, "headers": {"Idempotency-Key": "once"}}
    first = await site.admin.post(**ask)
    assert (first.status_code, first.json()["version"]) == (201, 4)
    again = await site.admin.post(**ask)
    assert (again.status_code, again.json()) == (201, first.json())
    other = {**ask, "headers": {"Idempotency-Key": "twice"}}
    error(await site.admin.post(**other), 409, "too_many_versions")


async def test_the_list_of_adapters_comes_in_pages(site: Site) -> None:
    await site.tenant("acme", {name: tiny.adapter(1) for name in ("a", "b", "c")})
    assert (await site.upload("acme", "b", tiny.adapter(2))).status_code == 201
    whole = (await site.admin.get(ADAPTERS)).json()
    assert ([one["name"] for one in whole["data"]], whole["next"]) == (["a", "b", "c"], None)
    assert whole["data"][1] == (await site.admin.get(f"{ADAPTERS}/b")).json()
    assert [one["report"]["rank"] for one in whole["data"][1]["versions"]] == [2, 2]
    found, after = [], None
    for names, next_ in ((["a"], "a"), (["b"], "b"), (["c"], None)):
        asked = {"limit": "2"} | ({"after": after} if after else {})
        page = (await site.admin.get(ADAPTERS, params=asked)).json()
        assert ([one["name"] for one in page["data"]], page["next"]) == (names, next_)
        found, after = [*found, *page["data"]], page["next"]
    assert found == whole["data"]
    big = (await site.admin.get(ADAPTERS, params={"limit": "1"})).json()
    assert [one["name"] for one in big["data"]] == ["a"]
    none = (await site.admin.get(ADAPTERS, params={"after": "zzz"})).json()
    assert none == {"object": "list", "data": [], "next": None}
    assert (await site.admin.get(ADAPTERS, params={"after": "/"})).status_code == 422
    assert (await site.admin.get(ADAPTERS, params={"limit": "0"})).status_code == 422

"""What an upload may waive, who may waive it, and what the log says of a refused one."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from tests.service.http.test_api import error
from tests.service.publishing.test_upload import URL, files, nothing_kept
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path, FakeEngine(tiny.base(), times=Times(step=0.001))) as site:
        await site.admin.post("/admin/v1/tenants", json={"id": "acme"})
        yield site


def with_config(**fields: Any) -> dict[str, bytes]:
    config = json.loads(files()[CONFIG_FILE]) | fields
    return {**files(), CONFIG_FILE: json.dumps(config).encode()}


async def test_an_implausible_adapter_is_refused_unless_the_operator_means_it(
    site: Site, tmp_path: Path
) -> None:
    sent = with_config(lora_alpha=1e6)
    refused = error(await site.admin.post(URL, files=sent), 422, "adapter_implausible", WEIGHTS_FILE)
    assert "allow_implausible=true" in refused["message"]
    await nothing_kept(site, tmp_path)
    made = await site.admin.post(f"{URL}?allow_implausible=true", files=sent)
    assert made.status_code == 201, made.text
    assert "spectral norm" in made.json()["report"]["implausible"]
    (shown,) = (await site.admin.get("/admin/v1/tenants/acme/adapters/a")).json()["versions"]
    assert shown["report"]["implausible"] == made.json()["report"]["implausible"]
    audit = (await site.admin.get("/admin/v1/audit?tenant=acme")).json()["data"]
    (created,) = [row["after"] for row in audit if row["action"] == "version.create"]
    assert created["implausible"] == made.json()["report"]["implausible"]


async def test_a_customer_cannot_waive_the_size_of_his_own_adapter(site: Site) -> None:
    issued = await site.admin.post("/admin/v1/tenants/acme/keys", json={"scopes": ["adapters:write"]})
    own = "/v1/adapters/a/versions"
    headers = bearer(issued.json()["key"])
    sent = with_config(lora_alpha=1e6)
    refused = await site.http.post(f"{own}?allow_implausible=true", files=sent, headers=headers)
    error(refused, 403, "permission_denied", "allow_implausible")
    error(await site.http.post(own, files=sent, headers=headers), 422, "adapter_implausible", WEIGHTS_FILE)


async def test_fields_that_do_not_matter_are_named_in_the_upload(site: Site, tmp_path: Path) -> None:
    sent = with_config(invocation_string="go", use_nextgen_lora=True)
    for query in ("", "?ignore_fields=", "?ignore_fields=invocation_string", "?ignore_fields=r,lora_alpha"):
        refused = error(
            await site.admin.post(URL + query, files=sent), 422, "config_unknown_field", CONFIG_FILE
        )
        assert "use_nextgen_lora" in refused["message"]
    await nothing_kept(site, tmp_path)
    made = await site.admin.post(f"{URL}?ignore_fields=use_nextgen_lora,%20invocation_string", files=sent)
    assert made.status_code == 201, made.text
    assert made.json()["report"]["ignored_fields"] == ["invocation_string", "use_nextgen_lora"]
    known = with_config(use_dora=True)
    error(
        await site.admin.post(f"{URL}?ignore_fields=use_dora", files=known),
        422,
        "dora_unsupported",
        CONFIG_FILE,
    )


async def test_waivers_tell_two_uploads_with_one_key_apart(site: Site) -> None:
    sent = with_config(lora_alpha=1e6)
    headers = {"Idempotency-Key": "one"}
    first = await site.admin.post(f"{URL}?allow_implausible=true", files=sent, headers=headers)
    again = await site.admin.post(f"{URL}?allow_implausible=true", files=sent, headers=headers)
    assert (first.status_code, again.json()) == (201, first.json())
    other = await site.admin.post(URL, files=sent, headers=headers)
    error(other, 409, "idempotency_conflict", "Idempotency-Key")


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (with_config(lora_alpha=1e6), "adapter_implausible"),
        (with_config(use_dora=True), "dora_unsupported"),
        ({CONFIG_FILE: files()[CONFIG_FILE]}, "upload_incomplete"),
    ],
)
async def test_a_refused_upload_is_one_line_with_customer_adapter_and_code(
    site: Site, caplog: pytest.LogCaptureFixture, sent: dict[str, bytes], code: str
) -> None:
    with caplog.at_level(logging.WARNING, logger="server.publishing.publish"):
        assert (await site.admin.post(URL, files=sent)).status_code >= 400
    (line,) = [record for record in caplog.records if record.name == "server.publishing.publish"]
    assert (line.tenant, line.adapter, line.code) == ("acme", "a", code)  # type: ignore[attr-defined]
    assert "acme/a" in line.getMessage()
    assert code in line.getMessage()

"""The server against its own OpenAPI document: whatever is sent, it answers as it says that it does.

``CASES`` is how many valid and how many invalid requests each operation gets; ``make fuzz`` asks for more.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from server.app import create_app
from server.settings import Settings
from tests.support import tiny
from tests.support.fakes import FakeEngine
from tests.support.site import ADMIN_KEY, TLS, Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated", "ignore::DeprecationWarning")

CASES = int(os.environ.get("CASES", "12"))
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
    checks.allow_header_conformance,
    checks.ignored_auth,
]


def rejects_what_is_invalid(context: Any, response: Any, case: schemathesis.Case) -> bool | None:
    """At once, or, for an upload that is answered with a job, by what becomes of the job."""
    if response.status_code == 202:
        return None
    return checks.negative_data_rejection(context, response, case)


# What a vendor's body may be is vLLM's to say, which takes more than the document shows.
OURS = [*CHECKS, rejects_what_is_invalid]
DOCUMENT = schemathesis.openapi.from_dict(create_app(Settings(model="/nowhere")).openapi())
OPERATIONS = {f"{op.method.upper()} {op.path}": op for op in (r.ok() for r in DOCUMENT.get_all_operations())}
KNOWN = {"tenant": "acme", "name": "a"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A served app in a thread of its own: Schemathesis' client is not asynchronous."""
    found: list[Site] = []
    ready, over = threading.Event(), threading.Event()

    async def serve(folder: Path) -> None:
        # Each operation is asked with wrong keys too, and answers each of them.
        async with fake_site(folder, FakeEngine(tiny.base(), max_model_len=256), auth_failures=0) as site:
            found.append(site)
            ready.set()
            while not over.is_set():
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=lambda: asyncio.run(serve(tmp_path_factory.mktemp("data"))))
    thread.start()
    assert ready.wait(60)
    yield found[0]
    over.set()
    thread.join()


class Keys:
    """The admin's key and a customer's, whose adapter ``a`` is there whatever was deleted before."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http
        self._customers = ""

    def by_tag(self) -> dict[str, str]:
        shown = self.http.get("/v1/models", headers=bearer(self._customers or "none"))
        if "a" not in [model["id"] for model in shown.json().get("data", ())]:
            self._customers = self._made()
        key = self._customers
        return {"admin": ADMIN_KEY, "inference": key, "self-service": key, "operations": ""}

    def _made(self) -> str:
        admin, headers = self.http, bearer(ADMIN_KEY)
        admin.post("/admin/v1/tenants", json={"id": "acme"}, headers=headers)
        if admin.get("/admin/v1/tenants/acme/adapters/a", headers=headers).status_code == 404:
            files = {file.name: file.read_bytes() for file in tiny.adapter(1).glob("adapter_*")}
            url = "/admin/v1/tenants/acme/adapters/a/versions"
            made = admin.post(url, files=files, headers=headers)
            assert made.status_code == 201, made.text
        scopes = ["inference", "adapters:write", "usage:read"]
        made = admin.post("/admin/v1/tenants/acme/keys", json={"scopes": scopes}, headers=headers)
        return str(made.json()["key"])


@pytest.fixture(scope="module")
def keys(site: Site) -> Iterator[Keys]:
    with httpx.Client(base_url=site.url, timeout=60, verify=TLS) as http:
        yield Keys(http)


def test_everything_is_documented() -> None:
    assert len(OPERATIONS) > 25
    for name, operation in OPERATIONS.items():
        raw = operation.definition.raw
        if raw["tags"] == ["operations"]:
            continue
        assert raw["security"], name
        success, *others = sorted(raw["responses"])
        assert success in ("200", "201", "204"), name
        assert {"401", "403", "500"} <= set(others), name
        content = raw["responses"][success].get("content", {})
        assert success == "204" or all(kind["schema"] for kind in content.values()), name
        forms = {"application/json", "application/jsonl", "application/x-tar"}
        assert success == "204" or content.keys() & forms, name


def test_what_is_no_request_is_answered_as_documented(site: Site) -> None:
    case = OPERATIONS["DELETE /v1/adapters/{name}/versions/{version}"].Case(
        path_parameters={"name": "a", "version": 1}, headers={"Content-Length": "4c"}
    )
    answer = case.call_and_validate(base_url=site.url, checks=CHECKS)
    assert answer.status_code == 400


def test_references_lead_somewhere() -> None:
    """The schemas of pydantic's nested models are in the document too."""
    whole = json.dumps(DOCUMENT.raw_schema)
    found = set(re.findall(r'"\$ref": "([^"]*)"', whole))
    assert len(found) > 20
    assert found <= {f"#/components/schemas/{name}" for name in DOCUMENT.raw_schema["components"]["schemas"]}


@pytest.mark.parametrize("known", [True, False], ids=["known", "any"])
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_answers_as_documented(
    site: Site, keys: Keys, name: str, mode: GenerationMode, known: bool
) -> None:
    operation = OPERATIONS[name]
    parameters = {parameter.name for parameter in operation.path_parameters}
    fixed: dict[str, Any] = {k: v for k, v in KNOWN.items() if k in parameters} if known else {}
    if known and not fixed and parameters:
        pytest.skip("there is nothing to know")
    if mode is GenerationMode.NEGATIVE and not (parameters - fixed.keys() or operation.body):
        pytest.skip("nothing can be invalid")
    (tag,) = operation.definition.raw["tags"]
    key = keys.by_tag()[tag]
    headers = bearer(key) if key else {}
    vendors = tag == "inference"

    @settings(
        max_examples=CASES,
        deadline=None,
        derandomize="CASES" not in os.environ,
        database=None,
        phases=[Phase.generate],
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode, path_parameters=fixed or None))
    def ask(case: schemathesis.Case) -> None:
        case.call_and_validate(base_url=site.url, headers=headers, checks=CHECKS if vendors else OURS)

    ask()
    assert keys.http.get("/ready").json()["status"] == "ready"

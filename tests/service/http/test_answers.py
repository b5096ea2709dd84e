"""The OpenAPI document lists every field of Loraplex's own answers, and no answer loses a field."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.model import PROBES_FILE
from server.http.answers import Residency
from server.inference.dialects.registry import SURFACES
from tests.service.batches.test_batches import CHAT, jsonl, line
from tests.service.publishing.test_golden import trained
from tests.service.publishing.test_upload import files
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

GOOD = ("200", "201")
TENANT = "/admin/v1/tenants/acme"


def undocumented(document: dict[str, Any], schema: dict[str, Any], value: Any, at: str = "") -> Iterator[str]:
    """The paths of all fields in ``value`` that ``schema`` does not name, where it names any."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    for part in schema.get("anyOf", []):
        if (part.get("type") == "null") == (value is None):
            yield from undocumented(document, part, value, at)
    if isinstance(value, list):
        for item in value:
            yield from undocumented(document, schema.get("items", {}), item, f"{at}[]")
    elif isinstance(value, dict) and (named := schema.get("properties")):
        for name, inner in value.items():
            if name in named:
                yield from undocumented(document, named[name], inner, f"{at}.{name}")
            else:
                yield f"{at}.{name}"


class Documented:
    """Makes calls, and fails where an answer has a field that the document does not list."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.document = site.app.openapi()
        self.routes: set[str] = set()
        self.documented = {
            f"{method.upper()} {path}"
            for path, methods in self.document["paths"].items()
            for method, operation in methods.items()
            if any("application/json" in operation["responses"].get(s, {}).get("content", {}) for s in GOOD)
        }

    async def __call__(self, method: str, path: str, url: str, /, key: str = "", **options: Any) -> Any:
        client = self.site.http if key else self.site.admin
        answer: httpx.Response = await client.request(
            method, url, headers=bearer(key) if key else {}, **options
        )
        assert answer.is_success, answer.text
        operation = self.document["paths"][path][method.lower()]
        schema = operation["responses"][str(answer.status_code)]["content"]["application/json"]["schema"]
        assert list(undocumented(self.document, schema, answer.json())) == [], path
        self.routes.add(f"{method} {path}")
        return answer.json()


async def test_every_field_is_documented(tmp_path: Path) -> None:
    async with fake_site(tmp_path) as site:
        call = Documented(site)
        admin = "/admin/v1/tenants/{tenant}"
        limits = {"limits": {"requests_per_minute": 1000}, "budgets": {"day": {"tokens": 100_000}}}
        await call("POST", "/admin/v1/tenants", "/admin/v1/tenants", json={"id": "acme", **limits})
        scopes = {"scopes": ["inference", "adapters:write", "usage:read", "keys:write"], "name": "mine"}
        made = await call("POST", f"{admin}/keys", f"{TENANT}/keys", json=scopes)
        key, old = made["key"], made["id"]
        await call(
            "POST",
            f"{admin}/keys/{{key_id}}/rotate",
            f"{TENANT}/keys/{old}/rotate",
            json={"overlap_seconds": 60},
        )
        probes = json.dumps(await trained(site)).encode()
        one = f"{admin}/adapters/{{name}}"
        upload = {"files": {**files(1), PROBES_FILE: probes}}
        await call("POST", f"{one}/versions", f"{TENANT}/adapters/a/versions", **upload)
        await call("POST", "/v1/adapters/{name}/versions", "/v1/adapters/a/versions", key=key, files=files(2))
        await call("PATCH", one, f"{TENANT}/adapters/a", json={"split": {"1": 50, "2": 50}})
        await call("PATCH", "/v1/adapters/{name}", "/v1/adapters/a", key=key, json={"default": True})
        await call("POST", f"{one}/warm", f"{TENANT}/adapters/a/warm", json={"version": 1, "slot": True})
        await call("POST", f"{one}/verify", f"{TENANT}/adapters/a/verify?version=1")
        assert (await site.chat(key, "hi", model="a", max_tokens=1)).status_code == 200
        await call("GET", "/admin/v1/tenants", "/admin/v1/tenants")
        for path in ("", "/keys", "/adapters"):
            await call("GET", f"{admin}{path}", f"{TENANT}{path}")
        await call("PATCH", admin, TENANT, json={"weight": 2})
        await call("GET", one, f"{TENANT}/adapters/a")
        await call("GET", "/v1/adapters/{name}", "/v1/adapters/a", key=key)
        await call(
            "PATCH",
            f"{one}/versions/{{version}}",
            f"{TENANT}/adapters/a/versions/1",
            json={"quarantined": False},
        )
        await call("GET", "/admin/v1/residency", "/admin/v1/residency?events=5")
        await call("GET", "/admin/v1/usage", "/admin/v1/usage?percentiles=true")
        await call("POST", "/v1/adapters/{name}/warm", "/v1/adapters/a/warm", key=key, json={"version": 1})
        await call("POST", "/v1/adapters/{name}/verify", "/v1/adapters/a/verify?version=1", key=key)
        noted = {"note": "tried"}
        version = "/v1/adapters/{name}/versions/{version}"
        await call("PATCH", version, "/v1/adapters/a/versions/1", key=key, json=noted)
        later = f"{TENANT}/adapters/a/versions?wait=false"
        upload_id = (await call("POST", f"{one}/versions", later, files=files(3)))["id"]
        for path, url, own in (
            (f"{one}/uploads", f"{TENANT}/adapters/a/uploads", None),
            (f"{one}/uploads/{{upload}}", f"{TENANT}/adapters/a/uploads/{upload_id}", None),
            ("/v1/adapters/{name}/uploads", "/v1/adapters/a/uploads", key),
            ("/v1/adapters/{name}/uploads/{upload}", f"/v1/adapters/a/uploads/{upload_id}", key),
            ("/admin/v1/uploads", "/admin/v1/uploads", None),
        ):
            await call("GET", path, url, **({"key": own} if own else {}))
        while (await site.admin.get(f"{TENANT}/adapters/a/uploads/{upload_id}")).json()["state"] != "done":
            await asyncio.sleep(0.05)
        await site.admin.patch(f"{TENANT}/adapters/a", json={"live": 1})
        for path, url, own in (
            (f"{one}/rollouts", f"{TENANT}/adapters/a/rollouts", {}),
            ("/v1/adapters/{name}/rollouts", "/v1/adapters/a/rollouts", {"key": key}),
        ):
            begun = await call("POST", path, url, json={"version": 2}, **own)
            await call("GET", path, url, **own)
            single = f"{path}/{{rollout}}", f"{url}/{begun['id']}"
            await call("PATCH", *single, json={"action": "forward"}, **own)
            await call("PATCH", *single, json={"action": "roll_back"}, **own)
            await call("GET", *single, **own)
        await call("PATCH", f"{admin}/keys/{{key_id}}", f"{TENANT}/keys/{old}", json={"name": "old"})
        await call("GET", f"{admin}/limits", f"{TENANT}/limits")
        own = await call("POST", "/v1/keys", "/v1/keys", key=key, json={"name": "own"})
        await call("POST", "/v1/keys/{key_id}/rotate", f"/v1/keys/{own['id']}/rotate", key=key)
        for path in ("/v1/me", "/v1/keys", "/v1/audit"):
            await call("GET", path, path, key=key)
        await call("POST", "/admin/v1/people", "/admin/v1/people", json={"name": "alice"})
        await call("POST", "/admin/v1/check", "/admin/v1/check", json={})
        await call("POST", "/admin/v1/backup", "/admin/v1/backup", json={})
        asked = jsonl(line(f"r{number}") for number in range(2000))  # not over before it is cancelled
        sent = {"files": {"file": asked}, "data": {"purpose": "batch"}}
        file = await call("POST", "/v1/files", "/v1/files", key=key, **sent)
        batch = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
        id_ = (await call("POST", "/v1/batches", "/v1/batches", key=key, json=batch))["id"]
        await call("GET", "/v1/batches/{batch_id}", f"/v1/batches/{id_}", key=key)
        await call("POST", "/v1/batches/{batch_id}/cancel", f"/v1/batches/{id_}/cancel", key=key)
        for path in ("/v1/files", "/v1/batches"):
            await call("GET", path, path, key=key)
        await call("GET", "/v1/files/{file_id}", f"/v1/files/{file['id']}", key=key)
        other = await call("POST", "/v1/files", "/v1/files", key=key, **sent)
        await call("DELETE", "/v1/files/{file_id}", f"/v1/files/{other['id']}", key=key)
        for path in (
            "/batches",
            "/me",
            "/people",
            "/replicas",
            "/check",
            "/usage",
            "/audit",
            "/residency",
            "/server",
            "/adapters",
            "/requests",
            "/rollouts",
        ):
            await call("GET", f"/admin/v1{path}", f"/admin/v1{path}")
        for path in ("/v1/usage", "/v1/adapters", "/v1/models"):
            await call("GET", path, path, key=key)
        await call("GET", "/v1/models/{name}", "/v1/models/a", key=key)
        await call("GET", "/health", "/health")
        await call("GET", "/ready", "/ready")
    vendors = {f"POST {dialect.path}" for dialect in SURFACES}
    tars = {route for route in call.documented if route.endswith("/download")}
    assert call.documented - call.routes == vendors | tars, "each call is tried here"


def test_a_field_that_is_not_listed_passes_through() -> None:
    rates = dict.fromkeys(("output_tokens_per_second", "first_token_p50", "first_token_p99"))
    whole = {name: {} for name in ("queued", "running", "counters")} | {
        "rates": {"seconds": 0.0, "first_tokens": 0, **rates},
        "slots": [], "host": [], "aside": 0, "drains": 0, "preemptions": 0, "draining": False, "new": [1],
    }  # fmt: skip
    assert Residency.model_validate(whole).model_dump(exclude_unset=True) == whole


def test_what_is_not_listed_is_found() -> None:
    document = {"components": {"schemas": {"One": {"properties": {"a": {"type": "integer"}}}}}}
    schema = {"properties": {"data": {"items": {"$ref": "#/components/schemas/One"}}}}
    assert list(undocumented(document, schema, {"data": [{"a": 1, "b": 2}], "c": 3})) == [".data[].b", ".c"]

"""What operators and customers read and remove of a tenant's adapters, and their uploads.

Where the two may do different things, ``admin`` and ``self_service`` have a function each.
"""

from __future__ import annotations

from typing import Any

from fastapi.responses import Response, StreamingResponse

from adapters.store.upload_jobs import JobSearch
from server.accounts.tenants import Tenant
from server.http import adapters, answers
from server.http import answers_operators as operators
from server.http.adapters import AdaptersAfter, UploadsAfter, Versions
from server.http.both import Both
from server.http.reports import Limit
from server.http.services import ServicesOf

both = Both("")


@both.get("", response_model=answers.Adapters)
async def list_adapters(
    owner: Tenant, services: ServicesOf, after: AdaptersAfter = None, limit: Versions = 1000
) -> Response:
    """By name. A page has as many as have `limit` versions together, and one at least."""
    return await adapters.listed(services, owner, after, limit)


@both.get("/{name}", response_model=answers.Adapter)
async def get_adapter(owner: Tenant, name: str, services: ServicesOf) -> Response:
    return await adapters.one(services, owner, name)


@both.delete("/{name}", status_code=204)
async def delete_adapter(owner: Tenant, name: str, services: ServicesOf) -> Response:
    await adapters.delete(services, owner, name)
    return Response(status_code=204)


@both.delete("/{name}/versions/{version}", status_code=204)
async def delete_version(owner: Tenant, name: str, version: int, services: ServicesOf) -> Response:
    await adapters.delete_version(services, owner, name, version)
    return Response(status_code=204)


@both.get("/{name}/versions/{version}/download", response_class=StreamingResponse)
async def download_version(owner: Tenant, name: str, version: int, services: ServicesOf) -> StreamingResponse:
    """A tar of the files that are served, with the `probes.json` that came along."""
    return await adapters.download(services, owner, name, version)


@both.get("/{name}/uploads", response_model=operators.Uploads)
async def list_uploads(
    owner: Tenant, name: str, services: ServicesOf, after: UploadsAfter = None, limit: Limit = 100
) -> dict[str, Any]:
    """Those that are answered later, and the newest that were refused, with the reason."""
    return await adapters.uploads(services, JobSearch(owner.id, name, after=after), limit)


@both.get("/{name}/uploads/{upload}", response_model=operators.Upload)
async def get_upload(owner: Tenant, name: str, upload: str, services: ServicesOf) -> dict[str, Any]:
    """How far an upload has come, and what became of it."""
    return await services.publishing.jobs.get(owner.id, name, upload)

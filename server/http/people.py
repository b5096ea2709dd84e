"""``/admin/v1/people``: named admin keys with roles; and who is asking."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import Field

from server.accounts.people import Role
from server.http.answers import Time
from server.http.auth import ADMIN, ADMIN_ROLE, AskedBy
from server.http.bodies import Body, body_as, documented
from server.http.services import ServicesOf
from server.inference.dialects.answers import Answer

router = APIRouter(prefix="/admin/v1", tags=["admin"], dependencies=[ADMIN])


class NewPerson(Body):
    """Somebody who gets a key of their own."""

    name: str
    role: Role = "operator"
    expires_at: datetime | None = Field(None, strict=False)


class PersonShown(Answer):
    """A person without the key; `id` is null for the key of the settings."""

    id: str | None
    name: str
    role: Role
    created_at: Time | None
    expires_at: Time | None
    last_used_at: Time | None


class PersonMade(PersonShown):
    """The only answer that shows the key."""

    key: str


class PeopleShown(Answer):
    """All of them, by name."""

    object: Literal["list"]
    data: list[PersonShown]


@router.get("/me", response_model=PersonShown, summary="Whose key this is, and its role")
async def me(person: AskedBy) -> dict[str, Any]:
    """Every role may ask."""
    return person.as_json()


@router.get("/people", response_model=PeopleShown, dependencies=[ADMIN_ROLE])
async def list_people(services: ServicesOf) -> dict[str, Any]:
    """Those with keys of their own; the key of the settings is not among them."""
    return {"object": "list", "data": [person.as_json() for person in await services.people.all()]}


@router.post(
    "/people",
    status_code=201,
    response_model=PersonMade,
    dependencies=[ADMIN_ROLE],
    openapi_extra=documented(NewPerson),
)
async def create_person(
    body: Annotated[NewPerson, body_as(NewPerson)], services: ServicesOf
) -> dict[str, Any]:
    """The only time that the key is shown."""
    person, key = await services.people.create(body.name, body.role, body.expires_at)
    return person.as_json() | {"key": key}


@router.delete("/people/{person}", status_code=204, dependencies=[ADMIN_ROLE])
async def remove_person(person: str, services: ServicesOf) -> Response:
    """Refused from the next request on."""
    await services.people.remove(person)
    return Response(status_code=204)

"""Rollouts, for operators (``/admin/v1/tenants/{tenant}/…``) and for customers (``/v1/adapters/…``)."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Query
from pydantic import Field, JsonValue, field_validator, model_validator
from pydantic_core import PydanticCustomError

from adapters.store.rollouts import ACTIVE, STATES, RolloutSearch, State
from server.accounts.tenants import Tenant
from server.http.answers import Number, Time
from server.http.auth import ADMIN
from server.http.bodies import Body, body_as, documented
from server.http.both import Both
from server.http.reports import Limit, page_of
from server.http.services import ServicesOf
from server.inference.dialects.answers import Answer, Count
from server.rollouts.guards import Guards
from server.rollouts.judge import Act, Wish
from server.rollouts.plan import STANDARD_GUARDS, STANDARD_HOLD_S, STANDARD_STEPS, WHOLE
from server.rollouts.stored import as_json

both = Both("/{name}/rollouts")
operators = APIRouter(prefix="/admin/v1", tags=["admin"], dependencies=[ADMIN])

MAX_STEPS = 20
LONGEST_HOLD_S = 30 * 86400
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(?:\d{1,7}[smhd])+", re.ASCII)


class NewRollout(Body):
    """A rollout to begin; what is not said is as in a standard one. ``hold`` in seconds, or as in `10m`."""

    version: int = Field(ge=1)
    steps: list[Annotated[int, Field(ge=1, le=WHOLE)]] = Field(
        list(STANDARD_STEPS), min_length=1, max_length=MAX_STEPS
    )
    hold: float = Field(STANDARD_HOLD_S, ge=0, le=LONGEST_HOLD_S, allow_inf_nan=False)
    guards: Guards = STANDARD_GUARDS

    @field_validator("hold", mode="before")
    @classmethod
    def _seconds(cls, hold: Any) -> Any:
        if not isinstance(hold, str):
            return hold
        if not _DURATION.fullmatch(hold):
            raise PydanticCustomError("duration", "Say it as in 90s, 10m, 1h30m or 2d, or in seconds.")
        return float(sum(int(n) * _UNITS[unit] for n, unit in re.findall(r"(\d+)([smhd])", hold)))

    @model_validator(mode="after")
    def _grow(self) -> Self:
        if self.steps != sorted(set(self.steps)) or self.steps[-1] != WHOLE:
            raise PydanticCustomError("steps", "Steps grow, and the last one is 100, as in [5, 25, 100].")
        return self


class RolloutChange(Body):
    """What becomes of it: `forward` takes the next step at once, `roll_back` gives the live one all back."""

    action: Act


class RolloutDecision(Answer):
    """One decision, with what decided it: of both versions, and of each test its evidence (1 is enough)."""

    at: Time
    action: Literal["start", "forward", "hold", "resume", "pause", "complete", "roll_back"]
    by: Annotated[str, Field(description="`guards`, `server`, `hand`, or who asked for it.")]
    step: Count
    share: Annotated[int, Field(ge=0, le=WHOLE)]
    reason: str
    numbers: dict[str, JsonValue]


class Rollout(Answer):
    """A version that gets a growing share of an adapter's requests."""

    id: str
    tenant: str
    adapter: str
    version: Number
    live: Annotated[Number, Field(description="The version that it is compared with.")]
    state: State
    steps: list[int]
    step: Annotated[Count, Field(description="Which of `steps` it is at, from 0.")]
    share: Annotated[int, Field(ge=0, le=WHOLE, description="Percent of the requests, now.")]
    hold: Annotated[float, Field(description="Seconds.")]
    guards: dict[str, JsonValue]
    held_by: Annotated[str | None, Field(description="`guards`, `server`, or who has paused it.")]
    waits_for: Annotated[str | None, Field(description="What is missing for the next step.")]
    reason: Annotated[str | None, Field(description="Of the last decision.")]
    created_at: Time
    updated_at: Time
    decisions: list[RolloutDecision]
    numbers: Annotated[dict[str, JsonValue] | None, Field(description="What was seen so far; null in lists.")]


class Rollouts(Answer):
    """The newest first."""

    object: Literal["list"]
    data: list[Rollout]


class AllRollouts(Rollouts):
    """One page of all customers', the newest first."""

    next: Annotated[str | None, Field(description="What `after` of the next page is; null at the end.")]


_New = Annotated[NewRollout, body_as(NewRollout)]
_Change = Annotated[RolloutChange, body_as(RolloutChange)]
_Wanted = Literal["active", "running", "held", "completed", "rolled_back"]
_Most = Annotated[int, Query(ge=1, le=100)]


@both.post("", status_code=201, response_model=Rollout, openapi_extra=documented(NewRollout))
async def create_rollout(owner: Tenant, name: str, body: _New, services: ServicesOf) -> dict[str, Any]:
    """Begins to give a version a growing share of the requests; 409 while another rollout runs."""
    wish = Wish(tuple(body.steps), body.hold, body.guards)
    return as_json(await services.judge.start(owner.id, name, body.version, wish))


@both.get("", response_model=Rollouts)
async def list_rollouts(owner: Tenant, name: str, services: ServicesOf, limit: _Most = 20) -> dict[str, Any]:
    found = await services.judge.rows.of_adapter(owner.id, name, limit)
    return {"object": "list", "data": [as_json(one) for one in found]}


@operators.get(
    "/rollouts", response_model=AllRollouts, summary="All customers' rollouts, newest first, a page at a time"
)
async def all_rollouts(
    services: ServicesOf,
    tenant: str | None = None,
    state: Annotated[_Wanted | None, Query(description="`active`: running or held.")] = None,
    after: Annotated[str | None, Query(max_length=32, description="`next` of the page before.")] = None,
    limit: Limit = 100,
) -> dict[str, Any]:
    """Which of them run, are held, or were taken back of late."""
    states = STATES if state is None else ACTIVE if state == "active" else (state,)
    found = await services.judge.rows.search(RolloutSearch(tenant, states, after), limit + 1)
    return page_of([as_json(one) for one in found], limit, "id")


@both.get("/{rollout}", response_model=Rollout)
async def get_rollout(owner: Tenant, name: str, rollout: str, services: ServicesOf) -> dict[str, Any]:
    """How far it has come, what it waits for, and what was decided with which numbers."""
    return as_json(await services.judge.rows.get(owner.id, name, rollout))


@both.patch("/{rollout}", response_model=Rollout, openapi_extra=documented(RolloutChange))
async def change_rollout(
    owner: Tenant, name: str, rollout: str, body: _Change, services: ServicesOf
) -> dict[str, Any]:
    """Pauses it, lets it go on, takes it a step further, or back; 409 for one that has ended."""
    return as_json(await services.judge.act(owner.id, name, rollout, body.action))

"""What may be set for a tenant or a key: limits by minute and at once, budgets by day and month.

The arithmetic with them is in ``server.limits``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

Period = Literal["day", "month"]
Unit = Literal["tokens", "cost"]
PERIODS: tuple[Period, ...] = ("day", "month")
UNITS: tuple[Unit, ...] = ("tokens", "cost")
# Costs are counted in these parts of the currency, so that sums of them are exact.
COST_UNIT = 1_000_000_000

MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000.0
# What the fairness rules divide by has to stay away from 0 and from infinity.
Weight = Annotated[float, Field(ge=MIN_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)]
# How many requests may wait or run; None for the server's own limit.
Places = Annotated[int, Field(ge=1, le=2**31 - 1)] | None
_Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Bytes = Annotated[int, Field(ge=1, le=2**60)]
_Tokens = Annotated[int, Field(ge=0, le=2**60)]
_Money = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class LimitSettings(BaseModel):
    """A part of what may be set for a tenant or a key; what is None is not limited by it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def changed(self, changes: Self) -> Self:
        """With what ``changes`` sets; what it sets to None is no longer limited."""
        return type(self)(**{**self.model_dump(), **changes.model_dump(exclude_unset=True)})

    def stored(self) -> dict[str, Any] | None:
        return self.model_dump(exclude_none=True) or None


class KeyLimits(LimitSettings):
    """``max_tokens`` is by request; ``adapters`` are the only ones it may name, ``base`` whether the base."""

    requests_per_minute: _Count | None = None
    tokens_per_minute: _Count | None = None
    requests_at_once: _Count | None = None
    max_tokens: _Count | None = None
    adapters: Annotated[list[Annotated[str, Field(max_length=128)]], Field(max_length=1000)] | None = None
    base: bool | None = None

    def allows(self, adapter: str | None) -> bool:
        """``adapter`` is None for the base model."""
        if adapter is None:
            return self.base is not False
        return self.adapters is None or adapter in self.adapters


class TenantLimits(KeyLimits):
    """``max_adapters`` and ``max_storage_bytes`` are for what the tenant uploads itself."""

    max_adapters: _Count | None = None
    max_storage_bytes: _Bytes | None = None


class Budget(LimitSettings):
    """``cost`` in the currency of the prices. Without the prefix a limit is hard."""

    tokens: _Tokens | None = None
    soft_tokens: _Tokens | None = None
    cost: _Money | None = None
    soft_cost: _Money | None = None

    def limit(self, unit: Unit, *, soft: bool) -> int | None:
        """In tokens, or in ``COST_UNIT``ths."""
        value = getattr(self, f"soft_{unit}" if soft else unit)
        return None if value is None else round(value * (COST_UNIT if unit == "cost" else 1))


class Budgets(LimitSettings):
    day: Budget | None = None
    month: Budget | None = None

    def changed(self, changes: Self) -> Self:
        """Each period as a whole: what is not said of it is not limited."""
        return type(self)(
            **{**dict(self), **{name: getattr(changes, name) for name in changes.model_fields_set}}
        )

    @property
    def of_money(self) -> bool:
        """Whether any of them is of money."""
        return any(each.cost is not None or each.soft_cost is not None for _, each in self.items())

    def items(self) -> Iterator[tuple[Period, Budget]]:
        for period in PERIODS:
            if (budget := getattr(self, period)) is not None:
                yield period, budget

"""What a tenant may still use, limit by limit and budget by budget, as JSON for people."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from server.accounts.tenants import Tenant
from server.accounts.terms import COST_UNIT, UNITS, Unit
from server.limits.budget import Spending, period_end
from server.limits.permissions import counted_scopes, limits_of
from server.limits.quotas import Quotas

_RATES = {"requests_per_minute": "requests", "tokens_per_minute": "tokens"}


async def standing(quotas: Quotas, tenant: Tenant) -> dict[str, Any]:
    """``limits`` of the tenant and of the key that it came with, and ``budgets``: what is used, what is left,
    and when it comes back. What requests under way have reserved counts as used.

    Raises Unavailable (``limits_unavailable``) where the ledger of budgets cannot be reached.
    """
    budget = quotas.budget(tenant)
    await quotas.ledger.refresh(budget)
    return {
        "limits": list(_limits(quotas, tenant)),
        "budgets": list(_budgets(quotas, tenant, quotas.ledger.spending(budget))),
    }


def _limits(quotas: Quotas, tenant: Tenant) -> Iterator[dict[str, Any]]:
    scopes = {scope.whose: scope for scope in counted_scopes(tenant)}
    for whose, limits in limits_of(tenant):
        left = quotas.ledger.remaining(scopes[whose]) if whose in scopes else {}
        for name, limit in (limits.stored() or {}).items():
            row: dict[str, Any] = {"of": whose, "limit": name, "allowed": limit}
            if name in _RATES:
                known = left.get(_RATES[name])
                rest = known.remaining if known else limit
                row |= {
                    "used": limit - rest,
                    "remaining": rest,
                    "resets_at": (quotas.now() + timedelta(seconds=known.reset if known else 0)).isoformat(),
                }
            yield row


def _budgets(quotas: Quotas, tenant: Tenant, spending: Spending) -> Iterator[dict[str, Any]]:
    now = quotas.now()
    spending.roll_over(now)
    for period, budget in tenant.budgets.items() if tenant.budgets else ():
        for unit in UNITS:
            hard, soft = budget.limit(unit, soft=False), budget.limit(unit, soft=True)
            if hard is None and soft is None:
                continue
            used = getattr(spending.used[period], unit)
            reserved = getattr(spending.reserved, unit)
            yield {
                "period": period,
                "unit": unit,
                "allowed": _in(unit, hard),
                "soft": _in(unit, soft),
                "used": _in(unit, used),
                "reserved": _in(unit, reserved),
                "remaining": None if hard is None else _in(unit, max(0, hard - used - reserved)),
                "resets_at": period_end(period, now).isoformat(),
            }


def _in(unit: Unit, amount: int | None) -> float | int | None:
    """A budget's amount as its setting has it: tokens, or the currency."""
    return amount if amount is None or unit == "tokens" else amount / COST_UNIT

"""Which limits a tenant and its key have, and what they may ask for, whatever was used so far."""

from __future__ import annotations

from collections.abc import Iterator

from server.accounts.tenants import Tenant
from server.accounts.terms import KeyLimits
from server.limits.errors import max_tokens_too_large, model_not_allowed
from server.limits.ledger import Scope


def limits_of(tenant: Tenant) -> Iterator[tuple[str, KeyLimits]]:
    """("tenant" or "key <id>", its limits), where there are any."""
    if tenant.limits is not None:
        yield "tenant", tenant.limits
    if tenant.key is not None and tenant.key.limits is not None:
        yield f"key {tenant.key.id}", tenant.key.limits


def counted_scopes(tenant: Tenant) -> list[Scope]:
    """The limits for which requests or tokens have to be counted."""
    return [
        Scope(tenant.id if whose == "tenant" else f"{tenant.id} {whose}", whose, limits)
        for whose, limits in limits_of(tenant)
        if limits.requests_at_once or limits.requests_per_minute or limits.tokens_per_minute
    ]


def may_name(tenant: Tenant, adapter: str | None) -> bool:
    """Whether tenant and key may use this adapter, or the base model (None)."""
    return all(limits.allows(adapter) for _, limits in limits_of(tenant))


def check_model(tenant: Tenant, adapter: str | None) -> None:
    """Forbidden (``model_not_allowed``) unless ``may_name``."""
    if not may_name(tenant, adapter):
        raise model_not_allowed()


def may_manage(tenant: Tenant, adapter: str) -> bool:
    """Whether the tenant's key may read and change this adapter: its own limits say so, and not the tenant's,
    which are about what is asked. Without a key it is an operator, who may."""
    limits = tenant.key.limits if tenant.key is not None else None
    return limits is None or limits.allows(adapter)


def check_max_tokens(tenant: Tenant, max_tokens: int, param: str) -> None:
    """BadRequest (``max_tokens_too_large``) if one answer may not be so long."""
    for whose, limits in limits_of(tenant):
        if limits.max_tokens is not None and max_tokens > limits.max_tokens:
            raise max_tokens_too_large(whose, limits.max_tokens, param)

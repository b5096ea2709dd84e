"""What claims make of somebody, and the keys of those who are signed in."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from server.accounts.sign_ins import LONGEST_NAME, Identity, SignIns, identity
from server.errors import Forbidden, Unauthorized
from server.settings import Settings

ISSUER = {"oidc_issuer": "https://login.example", "oidc_client_id": "loraplex"}


def rules(**fields: Any) -> Settings:
    return Settings(model="m", **(ISSUER | {"oidc_access": {"admins": "admin", "*": "viewer"}} | fields))


def access(claims: dict[str, Any], **fields: Any) -> str:
    return identity({"sub": "1", **claims}, rules(**fields)).access


def test_the_first_that_fits_counts() -> None:
    assert access({"groups": ["admins"]}) == "admin"
    assert access({"groups": "admins"}) == "admin"
    assert access({}) == "viewer"
    assert access({"groups": ["admins"]}, oidc_access={"*": "viewer", "admins": "admin"}) == "viewer"
    assert access({"groups": ["x"]}, oidc_access={"x": "tenant:acme"}) == "tenant:acme"


@pytest.mark.parametrize(
    ("claims", "claim"),
    [
        ({"realm_access": {"roles": ["admins"]}}, "realm_access.roles"),
        ({"https://acme.example/roles": ["admins"]}, "https://acme.example/roles"),
    ],
)
def test_a_claim_may_lie_in_another_and_have_dots(claims: dict[str, Any], claim: str) -> None:
    assert access(claims, oidc_claim=claim) == "admin"


def test_only_a_verified_address_counts() -> None:
    named = {"oidc_access": {"maria@example.org": "admin"}}
    claims: dict[str, Any] = {"email": "Maria@Example.org", "email_verified": True}
    assert access(claims, **named) == "admin"
    assert identity({"sub": "7", **claims}, rules()).name == "maria@example.org"
    for doubt in (False, None, "false", 1):
        with pytest.raises(Forbidden):
            access({**claims, "email_verified": doubt}, **named)
        assert identity({"sub": "7", **claims, "email_verified": doubt}, rules()).name == "7"
    with pytest.raises(Forbidden, match="domain"):
        access(claims, oidc_domains="example.com, example.net")
    with pytest.raises(Forbidden, match="domain"):
        access({**claims, "email": "x@evil-example.org"}, oidc_domains="example.org")
    assert access(claims, oidc_domains="example.com, Example.org") == "viewer"


@pytest.mark.parametrize("value", ["Acme", "../x", ["a", "b"], "", None, {"a": 1}])
def test_a_tenant_s_claim_is_one_tenant(value: Any) -> None:
    with pytest.raises(Forbidden):
        access({"org": value}, oidc_access={}, oidc_tenant_claim="org")
    assert access({"org": "acme"}, oidc_access={}, oidc_tenant_claim="org") == "tenant:acme"


def test_long_names_fit_the_audit_and_are_told_apart() -> None:
    names = {identity({"sub": "x" * 300 + end}, rules()).name for end in ("1", "2")}
    assert len(names) == 2
    assert {len(name) for name in names} == {LONGEST_NAME}
    assert identity({"sub": "a\nb"}, rules()).name == "ab"


def test_a_key_ends_by_itself_and_at_once_when_dismissed() -> None:
    signed_in = SignIns(limit=2)
    key = signed_in.admit(Identity("1", "maria", "operator"), 1)
    found = signed_in.find(key)
    assert found is not None
    assert found.person is not None
    assert found.person.actor == "person maria"
    over = signed_in.find(signed_in.admit(Identity("1", "maria", "operator"), -1))
    assert over is not None
    assert over.person is not None
    with pytest.raises(Unauthorized, match="expired"):
        over.person.check("viewer")
    signed_in.dismiss(key)
    assert signed_in.find(key) is None
    assert signed_in.find("lp-session-") is None
    keys = [signed_in.admit(Identity("1", "maria", "tenant:acme"), 1) for _ in range(3)]
    assert [signed_in.find(key) is not None for key in keys] == [False, True, True]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"oidc_issuer": "http://login.example"}, "https://"),
        ({"oidc_issuer": "https://login.example?x"}, "https://"),
        ({"oidc_client_id": ""}, "OIDC_CLIENT_ID"),
        ({"oidc_access": {}}, "OIDC_ACCESS"),
        ({"oidc_access": {"x": "root"}}, "viewer, operator, admin or tenant:"),
        ({"oidc_access": {"x": "tenant:A"}}, "viewer, operator, admin or tenant:"),
        ({"oidc_scopes": "email"}, "openid"),
    ],
)
def test_what_cannot_work_is_said_at_the_start(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        rules(**fields)

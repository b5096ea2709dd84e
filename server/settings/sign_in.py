"""Settings of the sign-in to the console by a provider of identities (OpenID Connect)."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode

from server.settings.serving import Serving

ACCESS = re.compile(r"viewer|operator|admin|tenant:[a-z0-9][a-z0-9-]{0,62}", re.ASCII)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class SignIn(Serving):
    """Who may sign in without a key, and as what."""

    oidc_issuer: str = Field(
        "",
        description="Provider of identities (OpenID Connect), `https://login.example`; see"
        " [console.md](console.md#people). None if empty.",
    )
    oidc_client_id: str = Field("", description="This server's client id at OIDC_ISSUER.")
    oidc_client_secret: SecretStr | None = Field(
        None, description="The client's secret; unset for a public client. PKCE is used with and without."
    )
    oidc_scopes: str = Field("openid email profile", description="Scopes that are asked for.")
    oidc_claim: str = Field(
        "groups",
        description="Claim whose values OIDC_ACCESS names; `realm_access.roles` for one inside another.",
    )
    oidc_access: dict[str, str] = Field(
        default_factory=dict,
        description="`viewer`, `operator`, `admin` or `tenant:NAME` by value of OIDC_CLAIM, by e-mail address"
        " or `*`, as JSON; the first that fits.",
    )
    oidc_tenant_claim: str = Field(
        "", description="Claim that holds the id of a customer, for its people; after OIDC_ACCESS."
    )
    oidc_domains: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Domains of verified e-mail addresses that may sign in, by commas; all if empty.",
    )
    oidc_name_claim: str = Field(
        "", description="Claim by which audit and log name somebody; the verified e-mail address, else `sub`."
    )
    oidc_label: str = Field(
        "single sign-on", max_length=60, description="What the sign-in page calls the provider."
    )
    oidc_hours: float = Field(
        12.0, gt=0, le=168, description="Hours after which somebody signs in again; two without use end it."
    )

    @field_validator("oidc_issuer")
    def _issuer_is_a_url(cls, issuer: str) -> str:
        parts = urlsplit(issuer)
        safe = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)
        if issuer and (not safe or not parts.hostname or parts.query or parts.fragment):
            raise ValueError(
                f"{issuer!r} must be an address that begins with https://, as the provider says it"
            )
        return issuer

    @field_validator("oidc_domains", mode="before")
    def _list_of_domains(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        if given.lstrip().startswith("["):
            return json.loads(given)
        return [domain.strip().lower() for domain in given.split(",") if domain.strip()]

    @field_validator("oidc_access")
    def _access_is_known(cls, access: dict[str, str]) -> dict[str, str]:
        for value in access.values():
            if not ACCESS.fullmatch(value):
                raise ValueError(f"{value!r} must be viewer, operator, admin or tenant: and a customer's id")
        return access

    @model_validator(mode="after")
    def _sign_in_is_whole(self) -> Self:
        if not self.oidc_issuer:
            return self
        if not self.oidc_client_id:
            raise ValueError("LORAPLEX_OIDC_CLIENT_ID must be set beside LORAPLEX_OIDC_ISSUER")
        if not self.oidc_access and not self.oidc_tenant_claim:
            raise ValueError(
                'LORAPLEX_OIDC_ACCESS must say who may what, as {"loraplex-admins": "admin", "*": "viewer"}'
            )
        if "openid" not in self.oidc_scopes.split():
            raise ValueError("LORAPLEX_OIDC_SCOPES must have openid among them")
        return self

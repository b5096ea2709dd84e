"""OpenID Connect, by Authlib: to the provider of identities and back, with PKCE, a state and a nonce.

What a sign-in under way needs to remember lies in its browser, signed: nobody can fill this process with
sign-ins that were begun and left.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from dataclasses import dataclass
from typing import Any

import httpx2
from authlib.common.errors import AuthlibBaseError
from authlib.integrations.starlette_client import StarletteIntegration, StarletteOAuth2App
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import OctKey

from server.settings.sign_in import SignIn

BEGUN_S = 600
TIMEOUT_S = 10.0
METADATA = "/.well-known/openid-configuration"

logger = logging.getLogger(__name__)
# Its debug lines have the verifier of PKCE.
logging.getLogger("authlib").setLevel(logging.INFO)


class SignInFailed(Exception):
    """Nobody was signed in; the text says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Known:
    """Who came back: what the provider says of them, and its token, by which it knows whom to sign out."""

    claims: dict[str, Any]
    id_token: str


class Provider:
    """The provider that the settings name."""

    def __init__(self, settings: SignIn) -> None:
        self._settings = settings
        self._own = OctKey.import_key(secrets.token_bytes(32))
        self._app: StarletteOAuth2App | None = None
        self._opening = asyncio.Lock()

    async def begin(self, back: str, after: str) -> tuple[str, str]:
        """The provider's address for a browser, and what the browser keeps until it comes to ``back``.

        SignInFailed where the provider does not answer.
        """
        app = await self._open()
        begun = await app.create_authorization_url(back)
        kept = {name: begun[name] for name in ("state", "nonce", "code_verifier")}
        claims = {**kept, "back": back, "after": after, "exp": int(time.time()) + BEGUN_S}
        return begun["url"], jwt.encode({"alg": "HS256"}, claims, self._own)

    async def end(self, kept: str, answer: dict[str, str]) -> tuple[Known, str]:
        """Who came back with ``answer``, and where they wanted to go; SignInFailed."""
        begun = self._begun(kept, answer.get("state", ""))
        if "error" in answer:
            said = answer.get("error_description") or answer["error"]
            raise SignInFailed(f"The provider let nobody in: {said[:200]}")
        if answer.get("iss", self._settings.oidc_issuer) != self._settings.oidc_issuer:
            raise SignInFailed("The answer is another provider's.")
        app = await self._open()
        try:
            token = await app.fetch_access_token(
                redirect_uri=begun["back"],
                code=answer.get("code", ""),
                code_verifier=begun["code_verifier"],
                state=begun["state"],
            )
            if not token.get("id_token"):
                raise SignInFailed("The provider sent no ID token; `openid` must be among its scopes.")
            claims = dict(await app.parse_id_token(token, nonce=begun["nonce"]))
            claims = await self._with_more(app, token, claims)
        except (AuthlibBaseError, JoseError, ValueError, KeyError, TypeError) as exc:
            logger.warning("a sign-in failed: %s", exc)
            raise SignInFailed("The provider's answer is not valid. Sign in again.") from exc
        except httpx2.HTTPError as exc:
            raise _away(exc) from exc
        return Known(claims, token["id_token"]), begun["after"]

    async def way_out(self, id_token: str, back: str) -> str | None:
        """The provider's address that ends its session, too, and leads to ``back``; None if it has none."""
        try:
            app = await self._open()
            found = await app.create_logout_url(
                back, id_token_hint=id_token, client_id=self._settings.oidc_client_id
            )
        except (SignInFailed, RuntimeError):
            return None
        return str(found["url"])

    def _begun(self, kept: str, state: str) -> dict[str, str]:
        """What this browser began; SignInFailed unless it was here, lately, and with this state."""
        try:
            claims = jwt.decode(kept, self._own, algorithms=["HS256"]).claims
            jwt.JWTClaimsRegistry(exp={"essential": True}).validate(claims)
        except (JoseError, ValueError):
            claims = {"state": ""}
        known = str(claims["state"])
        if not known or not hmac.compare_digest(known.encode(), state.encode()):
            raise SignInFailed("This sign-in was not begun in this browser, or is too old. Sign in again.")
        return {name: str(value) for name, value in claims.items()}

    async def _with_more(
        self, app: StarletteOAuth2App, token: dict[str, Any], claims: dict[str, Any]
    ) -> dict[str, Any]:
        """``claims`` and those that the provider only tells at its user-info endpoint."""
        if "userinfo_endpoint" not in app.server_metadata:
            return claims
        more = dict(await app.userinfo(token=token))
        if more.get("sub") != claims["sub"]:
            raise SignInFailed("The provider's answers are about two people.")
        return {**more, **claims}

    async def _open(self) -> StarletteOAuth2App:
        """The client, with what the provider says of itself; SignInFailed."""
        async with self._opening:
            if self._app is not None:
                return self._app
            settings = self._settings
            # Made once and elsewhere: to read the system's certificates holds up every stream.
            tls = await asyncio.to_thread(httpx2.create_ssl_context)
            secret = settings.oidc_client_secret
            app = StarletteOAuth2App(
                StarletteIntegration("sign-in"),
                client_id=settings.oidc_client_id,
                client_secret=secret.get_secret_value() if secret else None,
                server_metadata_url=settings.oidc_issuer.rstrip("/") + METADATA,
                client_kwargs={
                    "scope": settings.oidc_scopes,
                    "code_challenge_method": "S256",
                    "timeout": TIMEOUT_S,
                    "verify": tls,
                },
            )
            try:
                said = await app.load_server_metadata()
            except (httpx2.HTTPError, ValueError) as exc:
                raise _away(exc) from exc
            if said.get("issuer") != settings.oidc_issuer:
                logger.error(
                    "OIDC_ISSUER is %r, but says that it is %r", settings.oidc_issuer, said.get("issuer")
                )
                raise SignInFailed("The provider calls itself by another name than the settings do.")
            _take_care(app, said)
            self._app = app
            return app


def _take_care(app: StarletteOAuth2App, said: dict[str, Any]) -> None:
    """Signed tokens only, and the client's secret in the way that the provider takes it."""
    signed = [name for name in said.get("id_token_signing_alg_values_supported", []) if name != "none"]
    said["id_token_signing_alg_values_supported"] = signed or ["RS256"]
    ways = said.get("token_endpoint_auth_methods_supported") or ["client_secret_basic"]
    way = "client_secret_basic" if "client_secret_basic" in ways else "client_secret_post"
    app.client_kwargs["token_endpoint_auth_method"] = way if app.client_secret else "none"


def _away(exc: Exception) -> SignInFailed:
    logger.warning("the provider of identities does not answer: %s", exc)
    return SignInFailed("The provider of identities does not answer. Try again, or sign in with a key.")

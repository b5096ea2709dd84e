"""``/docs`` and ``/redoc``: the interactive reference, from files of an installed package.

Nothing comes from another host: people paste keys into these pages, and a server may have no internet.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, HTMLResponse, Response

from server.errors import NotFound

router = APIRouter(include_in_schema=False)

_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "redoc.standalone.js": "text/javascript",
    "favicon.png": "image/png",
}
# Both put styles into the page; Redoc searches in a worker of its own, and draws with data URLs.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'"
)
_SAFE = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
_SWAGGER = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Loraplex</title>
<link rel="icon" href="{root}/docs/assets/favicon.png">
<link rel="stylesheet" href="{root}/docs/assets/swagger-ui.css"></head>
<body><div id="swagger-ui"></div>
<script src="{root}/docs/assets/swagger-ui-bundle.js"></script>
<script src="{root}/docs/assets/start.js"></script></body></html>
"""
_REDOC = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Loraplex</title>
<link rel="icon" href="{root}/docs/assets/favicon.png"></head>
<body><redoc spec-url="{root}/openapi.json" disable-google-font="true"></redoc>
<script src="{root}/docs/assets/redoc.standalone.js"></script></body></html>
"""
# Its place tells it the prefix that a proxy may have.
_START = """const root = document.currentScript.src.replace("/docs/assets/start.js", "");
SwaggerUIBundle({
  url: root + "/openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  persistAuthorization: false,
  presets: [SwaggerUIBundle.presets.apis],
});
"""


@router.get("/docs")
async def swagger(request: Request) -> HTMLResponse:
    return HTMLResponse(_SWAGGER.format(root=_root(request)), headers=_SAFE)


@router.get("/redoc")
async def redoc(request: Request) -> HTMLResponse:
    return HTMLResponse(_REDOC.format(root=_root(request)), headers=_SAFE)


@router.get("/docs/assets/{name}")
async def asset(name: str) -> Response:
    """A file of the package; NotFound for any other name."""
    if name == "start.js":
        return Response(_START, media_type="text/javascript", headers=_SAFE)
    if name not in _ASSETS:
        raise NotFound("There is no such file.")
    return FileResponse(_folder() / name, media_type=_ASSETS[name], headers=_SAFE)


def _folder() -> Path:
    """Found, not imported: the package would bring an application of its own."""
    found = find_spec("fastapi_offline")
    if found is None or found.origin is None:
        raise NotFound("The package fastapi-offline, which has the pages' files, is not installed.")
    return Path(found.origin).parent / "static"


def _root(request: Request) -> str:
    """The operator's own setting, or what the proxy in front is known to strip."""
    return str(request.scope.get("root_path", "")).rstrip("/")

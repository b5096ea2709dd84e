"""The OpenAPI document: what FastAPI cannot see, since routes read their bodies themselves.

Every operation gets its key, its body, the statuses that it may answer with and the shape of its errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from adapters.model import CHAT_FILES
from server.http.answers import AnthropicError, Error
from server.http.examples import EXAMPLES, SUMMARIES, sample
from server.inference.dialects.messages import speaks_anthropic
from server.inference.dialects.registry import SURFACES
from server.inference.dialects.schema import TEXT as _TEXT
from server.inference.dialects.schema import Schema
from server.inference.dialects.schema import object_of as _object


def document(app: FastAPI) -> Callable[[], Schema]:
    """What to put in the place of ``app.openapi``."""
    plain = app.openapi

    def openapi() -> Schema:
        if app.openapi_schema is None:
            made = plain()
            schemas = made["components"]["schemas"]
            for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which nobody gets
                schemas.pop(unused, None)
            schemas |= _ERRORS
            made["components"]["securitySchemes"] = _SCHEMES
            for path, methods in made["paths"].items():
                for method, operation in methods.items():
                    _complete(path, method, operation)
                    operation["x-codeSamples"] = [sample(path, method, operation)]
                    schemas |= _definitions(operation)
            app.openapi_schema = made
        return app.openapi_schema

    return openapi


def _definitions(operation: Schema) -> Schema:
    """What a body's schema refers to, which has its place beside the answers'."""
    content = operation.get("requestBody", {}).get("content", {})
    schemas = [kind["schema"].pop("$defs", {}) for kind in content.values()]
    return {name: schema for defined in schemas for name, schema in defined.items()}


def _complete(path: str, method: str, operation: Schema) -> None:
    (tag,) = operation["tags"]
    responses = operation["responses"]
    responses.pop("422", None)
    if method == "post" and path in _BODIES:
        operation["requestBody"] = {"required": True, "content": _json(_BODIES[path])}
    if path.endswith("/versions"):
        operation["requestBody"] = {"required": True, "content": _UPLOAD}
        accepted = _json({"$ref": "#/components/schemas/Upload"})
        responses["202"] = {"description": "The bytes are here; see `wait`.", "content": accepted}
    if path == "/v1/files" and method == "post":
        operation["requestBody"] = {"required": True, "content": _FILE_UPLOAD}
    if path == "/v1/files/{file_id}/content":
        responses["200"]["content"] = {"application/jsonl": {"schema": _TEXT}}
    if path.endswith("/download"):
        responses["200"]["content"] = {"application/x-tar": {"schema": _FILE}}
    _describe(path if tag == "inference" else _short(path), method, operation)
    if form := _OTHER_FORMS.get(_short(path)):
        responses["200"]["content"][form] = {"schema": _TEXT}
    if path in _STREAMS:
        responses["200"]["content"]["text/event-stream"] = {"schema": _EVENT}
    if tag == "operations":
        responses["400"] = _error("400", "Error")
        if path == "/metrics":
            responses["200"]["content"] = {"text/plain": {"schema": _TEXT}}
            responses |= {status: _error(status, "Error") for status in ("401", "429")}
            operation["security"] = [{}, {"key": []}]
        elif path == "/ready":
            responses["503"] = {"description": "Not ready, and why.", "content": responses["200"]["content"]}
        return
    body = "requestBody" in operation
    error = "AnthropicError" if speaks_anthropic(path) else "Error"
    for status in _statuses(tag, path, body or bool(operation.get("parameters")), body):
        responses[status] = _error(status, error)
    schemes = ["key", "anthropic_key"] if speaks_anthropic(path) else ["key"]
    operation["security"] = [{scheme: []} for scheme in schemes]


def _describe(path: str, method: str, operation: Schema) -> None:
    name = f"{method} {path}"
    operation["summary"] = SUMMARIES.get(name, operation["summary"])
    content = operation.get("requestBody", {}).get("content", {})
    if name in EXAMPLES and "application/json" in content:
        content["application/json"]["example"] = EXAMPLES[name]


def _short(path: str) -> str:
    """The same for an operator and for a customer who looks after its own adapters."""
    return re.sub(r"^(/admin)?/v1(/tenants/{tenant}(?=/adapters))?", "", path)


# With an ``after``, or a replica, that may not be there.
_LISTS = ("/files", "/batches", "/uploads", "/residency", "/rollouts")


def _statuses(tag: str, path: str, arguments: bool, body: bool) -> list[str]:
    found = ["400", "401", "403", "429", "500"]
    if body:
        found += ["408", "413", "415"]
    if body and tag == "inference":
        found += ["503"]
    if "{" in path or tag == "inference" or path.endswith(_LISTS):
        found += ["404"]
    if tag != "inference" and arguments:
        found += ["409", "422"]
    if path.endswith(("/versions", "/warm", "/verify", "/files")):
        found += ["503"]
    if path.endswith(("/versions", "/files")):
        found += ["507"]
    return found


def _error(status: str, shape: str) -> Schema:
    content = _json({"$ref": f"#/components/schemas/{shape}"})
    if status == "400":
        content["text/plain"] = {"schema": _TEXT}  # to what is no HTTP request
    response: Schema = {"description": _MEANS[status], "content": content}
    if status in ("429", "503"):
        after = {"required": True, "schema": {"type": "integer", "minimum": 1}, "description": "Seconds."}
        response["headers"] = {"Retry-After": after}
    return response


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


_MEANS = {
    "400": "The body, a header or a value is wrong; as text where it is no HTTP request at all.",
    "401": "No key, or a wrong one.",
    "403": "A good key for something else.",
    "404": "There is no such thing, or it is another's.",
    "408": "The body did not come in time.",
    "409": "It is there already, or it is needed.",
    "413": "The body is too large.",
    "415": "The body is compressed.",
    "422": "It can be read, but not done.",
    "429": "Too many requests of this customer, or with wrong keys from this address.",
    "500": "A defect of the server.",
    "503": "The server cannot answer now.",
    "507": "The disk is full.",
}
_BODIES = {dialect.path: dialect.body for dialect in SURFACES}
_STREAMS = {dialect.path for dialect in SURFACES if dialect.streams} | {"/admin/v1/residency"}
# Of a stream, each event.
_EVENT = _object("data", event=_TEXT, data=_TEXT)
_FILE = {"type": "string", "format": "binary"}
_UPLOAD = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": ["adapter_config.json", "adapter_model.safetensors"],
            "properties": {
                "adapter_config.json": _FILE,
                "adapter_model.safetensors": _FILE,
                "initial_adapter_model.safetensors": _FILE,
                "probes.json": _FILE,
                **dict.fromkeys(CHAT_FILES, _FILE),
            },
        }
    },
    **{kind: {"schema": _FILE} for kind in ("application/x-tar", "application/gzip", "application/zip")},
    # Where the operator allows sources.
    "application/json": {"schema": _object("source", source=_TEXT) | {"additionalProperties": False}},
}
_FILE_UPLOAD = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": ["purpose", "file"],
            "properties": {
                "purpose": {"enum": ["batch"]},
                "file": _FILE,
                "expires_after[anchor]": {"enum": ["created_at"]},
                "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
            },
        }
    }
}
_OTHER_FORMS = {"/usage": "text/csv", "/audit": "application/jsonl"}
_SCHEMES: Schema = {
    "key": {"type": "http", "scheme": "bearer"},
    "anthropic_key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
_ERRORS: Schema = models_json_schema(
    [(Error, "serialization"), (AnthropicError, "serialization")],
    ref_template="#/components/schemas/{model}",
)[1]["$defs"]

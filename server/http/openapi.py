"""The OpenAPI document: what FastAPI cannot see, since routes read their bodies themselves.

Every operation gets its key, its body, the statuses that it may answer with and the shape of its errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from fastapi import FastAPI

from server.inference.dialects.messages import speaks_anthropic
from server.inference.dialects.registry import DIALECTS
from server.inference.dialects.schema import ANY as _ANY
from server.inference.dialects.schema import BOOL as _BOOL
from server.inference.dialects.schema import NUMBER as _NUMBER
from server.inference.dialects.schema import TEXT as _TEXT
from server.inference.dialects.schema import TOKENS as _TOKENS
from server.inference.dialects.schema import Schema
from server.inference.dialects.schema import object_of as _object


def document(app: FastAPI) -> Callable[[], Schema]:
    """What to put in the place of ``app.openapi``."""
    plain = app.openapi

    def openapi() -> Schema:
        if app.openapi_schema is None:
            made = plain()
            made["components"] = {**_COMPONENTS, "schemas": dict(_COMPONENTS["schemas"])}
            for path, methods in made["paths"].items():
                for method, operation in methods.items():
                    _complete(path, method, operation)
                    made["components"]["schemas"] |= _definitions(operation)
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
    if shape := _ANSWERS.get(path if tag == "inference" else f"{method} {_short(path)}"):
        (status,) = responses
        responses[status]["content"] = _json({"$ref": f"#/components/schemas/{shape}"})
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
            responses["503"] = {"description": "Not ready, and why.", "content": _json(_ANY)}
        return
    body = "requestBody" in operation
    error = "AnthropicError" if speaks_anthropic(path) else "Error"
    for status in _statuses(tag, path, body or bool(operation.get("parameters")), body):
        responses[status] = _error(status, error)
    schemes = ["key", "anthropic_key"] if speaks_anthropic(path) else ["key"]
    operation["security"] = [{scheme: []} for scheme in schemes]


def _short(path: str) -> str:
    """The same for an operator and for a customer who looks after its own adapters."""
    return re.sub(r"^(/admin)?/v1(/tenants/{tenant}(?=/adapters))?", "", path)


def _statuses(tag: str, path: str, arguments: bool, body: bool) -> list[str]:
    found = ["400", "401", "403", "429", "500"]
    if body:
        found += ["408", "413", "415"]
    if body and tag == "inference":
        found += ["503"]
    if "{" in path or tag == "inference":
        found += ["404"]
    if tag != "inference" and arguments:
        found += ["409", "422"]
    if path.endswith(("/versions", "/warm", "/verify")):
        found += ["503"]
    if path.endswith("/versions"):
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


def _closed(required: str = "", /, **properties: Schema) -> Schema:
    return _object(required, **properties) | {"additionalProperties": False}


def _list_of(schema: Schema) -> Schema:
    return _object("object data", object={"const": "list"}, data={"type": "array", "items": schema})


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


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
_COUNT: Schema = {"type": "integer", "minimum": 0}
_BODIES = {dialect.path: dialect.body for dialect in DIALECTS.values()}
_STREAMS = {dialect.path for dialect in DIALECTS.values() if dialect.streams}
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
            },
        }
    },
    **{kind: {"schema": _FILE} for kind in ("application/x-tar", "application/gzip", "application/zip")},
    # Where the operator allows sources.
    "application/json": {"schema": _closed("source", source=_TEXT)},
}
_ANSWERS = {
    "/v1/models": "Models",
    "/v1/models/{name}": "Model",
    "/v1/chat/completions": "ChatCompletion",
    "/v1/completions": "Completion",
    "/v1/responses": "Response",
    "/v1/messages": "Message",
    "/v1/embeddings": "Embeddings",
    "/v1/messages/count_tokens": "TokenCount",
    "/tokenize": "Tokens",
    "/detokenize": "Prompt",
    "post /tenants": "Tenant",
    "get /tenants": "Tenants",
    "get /tenants/{tenant}": "Tenant",
    "patch /tenants/{tenant}": "Tenant",
    "post /tenants/{tenant}/keys": "NewKey",
    "get /tenants/{tenant}/keys": "Keys",
    "post /tenants/{tenant}/keys/{key_id}/rotate": "RotatedKey",
    "post /adapters/{name}/versions": "NewVersion",
    "post /adapters/{name}/warm": "Warm",
    "post /adapters/{name}/verify": "Verified",
    "get /adapters": "Adapters",
    "get /adapters/{name}": "Adapter",
    "patch /adapters/{name}": "Adapter",
    "get /residency": "Residency",
    "get /usage": "Usage",
    "get /audit": "Audit",
}
_OTHER_FORMS = {"/usage": "text/csv", "/audit": "application/jsonl"}
_TIME = {"type": "string", "format": "date-time"}
_TIER = {"enum": ["disk", "host", "gpu"]}
_VERSION = {"type": "integer", "minimum": 1}
_DIGEST = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_PER_TENANT = {"type": "object", "additionalProperties": _NUMBER}
_TENANT = _object(
    "id name weight priority base_allowed max_queued max_running limits budgets created_at",
    id=_TEXT,
    name=_TEXT,
    weight=_NUMBER,
    priority={"enum": ["interactive", "standard", "batch"]},
    base_allowed=_BOOL,
    max_queued=_or_null(_COUNT),
    max_running=_or_null(_COUNT),
    limits=_ANY,
    budgets=_ANY,
    created_at=_TIME,
)
_KEY = _object(
    "id name scopes limits created_at expires_at last_used_at",
    id=_TEXT,
    name=_or_null(_TEXT),
    scopes={"type": "array", "items": {"enum": ["inference", "adapters:write", "usage:read"]}},
    limits=_ANY,
    created_at=_TIME,
    expires_at=_or_null(_TIME),
    last_used_at=_or_null(_TIME),
)
_NEW_KEY = {"id": _TEXT, "key": _TEXT, "name": _or_null(_TEXT)}
_ADAPTER = _object(
    "name tenant live default pinned split keep_versions tier created_at versions",
    name=_TEXT,
    tenant=_TEXT,
    live=_or_null(_VERSION),
    default=_BOOL,
    pinned=_BOOL,
    split=_or_null({"type": "object", "additionalProperties": _VERSION}),
    keep_versions=_or_null(_COUNT),
    tier=_TIER,
    created_at=_TIME,
    versions={
        "type": "array",
        "items": _object(
            "version digest tier created_at report",
            version=_VERSION,
            digest=_DIGEST,
            tier=_TIER,
            created_at=_TIME,
            report=_ANY,
        ),
    },
)
_MODEL_CARD = _object(
    "id object created owned_by",
    id=_TEXT,
    object={"const": "model"},
    created=_COUNT,
    owned_by=_TEXT,
    parent=_TEXT,
)
_OPENAI_USAGE = _object(
    "prompt_tokens completion_tokens total_tokens",
    prompt_tokens=_COUNT,
    completion_tokens=_COUNT,
    total_tokens=_COUNT,
)
_USAGE = _object("input_tokens output_tokens", input_tokens=_COUNT, output_tokens=_COUNT)


def _answer(object_: str, **choice: Schema) -> Schema:
    one = _object(
        f"index finish_reason {' '.join(choice)}", index=_COUNT, finish_reason=_or_null(_TEXT), **choice
    )
    return _object(
        "id object created model choices usage",
        id=_TEXT,
        object={"const": object_},
        created=_COUNT,
        model=_TEXT,
        choices={"type": "array", "minItems": 1, "items": one},
        usage=_OPENAI_USAGE,
    )


_COMPONENTS: Schema = {
    "securitySchemes": {
        "key": {"type": "http", "scheme": "bearer"},
        "anthropic_key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    },
    "schemas": {
        "Error": _closed(
            "error",
            error=_closed(
                "message type param code", message=_TEXT, type=_TEXT, param=_or_null(_TEXT), code=_TEXT
            ),
        ),
        "AnthropicError": _closed(
            "type error",
            type={"const": "error"},
            error=_closed("type message code", type=_TEXT, message=_TEXT, code=_TEXT),
        ),
        "Model": _MODEL_CARD,
        "Models": _list_of(_MODEL_CARD),
        "ChatCompletion": _answer("chat.completion", message=_object("role content", role=_TEXT)),
        "Completion": _answer("text_completion", text=_TEXT),
        "Response": _object(
            "id object created_at model status output usage",
            id=_TEXT,
            object={"const": "response"},
            created_at=_COUNT,
            model=_TEXT,
            status={"enum": ["completed", "incomplete", "cancelled"]},
            output={"type": "array", "items": _object("type", type=_TEXT)},
            usage=_USAGE,
        ),
        "Message": _object(
            "id type role content model usage",
            id=_TEXT,
            type={"const": "message"},
            role={"const": "assistant"},
            content={"type": "array", "items": _object("type", type=_TEXT)},
            model=_TEXT,
            stop_reason=_TEXT,
            usage=_USAGE,
        ),
        "Embeddings": _object(
            "object data model usage",
            object={"const": "list"},
            data={
                "type": "array",
                "items": _object(
                    "index object embedding",
                    index=_COUNT,
                    object={"const": "embedding"},
                    embedding={"anyOf": [{"type": "array", "items": _NUMBER}, _TEXT]},
                ),
            },
            model=_TEXT,
            usage=_object("prompt_tokens total_tokens", prompt_tokens=_COUNT, total_tokens=_COUNT),
        ),
        "TokenCount": _object("input_tokens", input_tokens=_COUNT),
        "Tokens": _object("tokens count max_model_len", tokens=_TOKENS, count=_COUNT, max_model_len=_COUNT),
        "Prompt": _closed("prompt", prompt=_TEXT),
        "Tenant": _TENANT,
        "Tenants": _list_of(_TENANT),
        "Keys": _list_of(_KEY),
        "NewKey": _object("id key name", **_NEW_KEY),
        "RotatedKey": _object("id key name replaces", **_NEW_KEY, replaces=_KEY),
        "Adapter": _ADAPTER,
        "Adapters": _list_of(_ADAPTER),
        "NewVersion": _object(
            "adapter version digest live report",
            adapter=_TEXT,
            version=_VERSION,
            digest=_DIGEST,
            live=_or_null(_VERSION),
            report=_ANY,
        ),
        "Warm": _object("adapter version tier", adapter=_TEXT, version=_VERSION, tier=_TIER),
        "Verified": _ANY,
        "Usage": _list_of(_object("requests prompt_tokens cached_tokens output_tokens")),
        "Audit": _list_of(_object("id at actor action tenant target before after request_id"))
        | {"required": ["object", "data", "next"]},
        "Residency": _object(
            "slots host queued running counters aside drains preemptions draining",
            slots={"type": "array", "items": _object("version state running draining")},
            host={"type": "array", "items": _object("version state tier pinned size_bytes")},
            queued=_PER_TENANT,
            running=_PER_TENANT,
            counters=_PER_TENANT,
            aside=_COUNT,
            drains=_COUNT,
            preemptions=_COUNT,
            draining=_BOOL,
        ),
    },
}

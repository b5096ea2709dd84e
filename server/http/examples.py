"""What the reference shows of each call: a line that says what it does, and a body that can be sent."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

from server.inference.dialects.registry import SURFACES

# By method and short path, see ``server.http.openapi``.
SUMMARIES = {
    "get /tenants": "All tenants",
    "post /tenants": "Make a tenant, a customer",
    "get /tenants/{tenant}": "A tenant with its limits and budgets",
    "patch /tenants/{tenant}": "Change a tenant; null takes a limit away",
    "delete /tenants/{tenant}": "Remove a tenant with its keys and adapters; running requests finish",
    "post /tenants/{tenant}/keys": "Make a key, which is shown this once",
    "get /tenants/{tenant}/keys": "A tenant's keys, without the keys themselves",
    "post /tenants/{tenant}/keys/{key_id}/rotate": "Replace a key; the old one may live on for a while",
    "patch /tenants/{tenant}/keys/{key_id}": "Change a key's name, scopes, limits or end",
    "delete /tenants/{tenant}/keys/{key_id}": "Revoke a key at once",
    "post /adapters/{name}/versions": "Upload a version of an adapter, which becomes the live one",
    "get /adapters": "All adapters, with versions, tiers and reports",
    "get /adapters/{name}": "An adapter with its versions, tiers and reports",
    "patch /adapters/{name}": "Choose the live version, split the requests, pin, or make it the default",
    "delete /adapters/{name}": "Remove an adapter; running requests finish",
    "post /adapters/{name}/warm": "Bring an adapter nearer to the GPU before it is asked for",
    "patch /adapters/{name}/versions/{version}": "Take a version out of service, or put it back",
    "delete /adapters/{name}/versions/{version}": "Remove a version that does not answer",
    "post /adapters/{name}/verify": "Hold a version against the golden probes it came with",
    "get /residency": "Slots, host memory and queues as they are now",
    "get /health": "Whether the process lives",
    "get /ready": "Whether a token passes the engine and the database answers",
    "get /metrics": "Metrics, in the form of Prometheus",
}
EXAMPLES: dict[str, Any] = {
    **{f"post {dialect.path}": dialect.example for dialect in SURFACES},
    "post /batches": {
        "input_file_id": "file-123",
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    },
    "post /tenants": {
        "id": "acme",
        "name": "Acme Inc.",
        "weight": 2.0,
        "limits": {"tokens_per_minute": 60000},
    },
    "patch /tenants/{tenant}": {"limits": {"requests_per_minute": 60}},
    "post /tenants/{tenant}/keys": {"name": "production", "scopes": ["inference"]},
    "post /tenants/{tenant}/keys/{key_id}/rotate": {"overlap_seconds": 3600},
    "patch /tenants/{tenant}/keys/{key_id}": {"name": "staging", "limits": {"requests_at_once": 4}},
    "post /people": {"name": "Ada", "role": "viewer"},
    "post /adapters/{name}/rollouts": {"version": 4, "steps": [5, 25, 100], "hold": 600},
    "patch /adapters/{name}/rollouts/{rollout}": {"action": "pause"},
    "patch /adapters/{name}": {"split": {"3": 90, "4": 10}},
    "post /adapters/{name}/versions": {"source": "s3://adapters/support/"},
    "post /adapters/{name}/warm": {"slot": True},
    "patch /adapters/{name}/versions/{version}": {"quarantined": False},
}
# What stands in a path of a sample.
_NAMES = {
    "tenant": "acme", "name": "support", "version": "3", "key_id": "1", "file_id": "file-123",
    "batch_id": "batch_123",
}  # fmt: skip
# By the first part of a path.
_KEYS = {"v1": "LORAPLEX_KEY", "admin": "LORAPLEX_ADMIN_KEY"} | {
    dialect.path.split("/")[1]: "LORAPLEX_KEY" for dialect in SURFACES
}


def sample(path: str, method: str, operation: dict[str, Any]) -> dict[str, str]:
    """``operation`` as a line for a shell, in the form that ReDoc shows beside it."""
    url = re.sub(r"{(\w+)}", lambda found: _NAMES.get(found[1], "1"), path)
    parts = ["curl" if method == "get" else f"curl -X {method.upper()}", f'"$LORAPLEX_URL{url}"']
    if (key := _KEYS.get(path.split("/")[1])) is not None:
        parts.append(f'-H "Authorization: Bearer ${key}"')
    content = operation.get("requestBody", {}).get("content", {})
    if "multipart/form-data" in content:
        fields = content["multipart/form-data"]["schema"]
        parts += [f"-F {_field(name, fields['properties'][name])}" for name in fields["required"]]
    elif "example" in (body := content.get("application/json", {})):
        parts += ['-H "Content-Type: application/json"', f"-d {shlex.quote(json.dumps(body['example']))}"]
    return {"lang": "Shell", "label": "curl", "source": " \\\n  ".join(parts)}


def _field(name: str, schema: dict[str, Any]) -> str:
    return f"{name}={schema['enum'][0]}" if "enum" in schema else f"{name}=@{name}"

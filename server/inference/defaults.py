"""What an adapter says where a request says nothing: sampling, the length of an answer, a system prompt.

Pure. The defaults are those that a version was uploaded with, under those that were set for its adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.inference.dialects.base import Dialect

_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


def with_defaults(dialect: Dialect, body: Mapping[str, Any], chat: Mapping[str, Any]) -> dict[str, Any]:
    """``body`` with what ``chat``, of the version that answers, says beside it; see ``Version.chat``.

    A length is no part of it: limits and the request's own come first, see ``default_max_tokens``.
    """
    filled = dict(body)
    defaults = chat.get("defaults") or {}
    for name in _SAMPLING:
        if name in defaults and name in dialect.accepted and filled.get(name) is None:
            filled[name] = defaults[name]
    if defaults.get("system"):
        dialect.add_system(filled, defaults["system"])
    stops = chat.get("stop_token_ids") or ()
    if stops and "stop_token_ids" in dialect.accepted:
        given = filled.get("stop_token_ids")
        if given is None or isinstance(given, list):
            filled["stop_token_ids"] = [*(given or ()), *stops]
    return filled


def default_max_tokens(dialect: Dialect, chat: Mapping[str, Any]) -> int | None:
    """Tokens of an answer that asks for no number; None for as many as fit."""
    found = (chat.get("defaults") or {}).get("max_tokens")
    return int(found) if found is not None else dialect.default_max_tokens

"""How a version chats, where that differs from its base: read from its files when it is first asked."""

from __future__ import annotations

import asyncio
import contextvars
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters.errors import AdapterUnavailable
from adapters.model import CHAT_FILE, Version

# Each may hold a template of 128 KiB.
REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class Manner:
    """``template`` is None for the base's; ``content_format`` is how it takes a message's content.

    ``tokens`` are special tokens that the base's tokenizer has not, by their text. ``tenant`` is whose it is.
    """

    template: str | None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    content_format: str = "string"
    tokens: Mapping[str, int] = field(default_factory=dict)
    tenant: str = ""


class Manners:
    """Of versions, by their tenant and digest: two tenants may have the same files."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str], Manner] = OrderedDict()

    async def of(self, version: Version | None) -> Manner | None:
        """None where the base's holds. Raises AdapterUnavailable where the version's files are not here."""
        if version is None or not version.chat.get("kept"):
            return None
        key = version.tenant, version.digest
        found = self._known.get(key)
        if found is None:
            try:
                found = await asyncio.to_thread(_read, version)
            except FileNotFoundError as exc:  # another process of the fleet may have it
                raise AdapterUnavailable("The adapter's chat template is not here yet; try again.") from exc
            self._known[key] = found
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        return found


def _read(version: Version) -> Manner:
    kept: dict[str, Any] = json.loads((version.path / CHAT_FILE).read_text(encoding="utf-8"))
    return Manner(
        kept.get("template"),
        kept.get("special_tokens") or {},
        tuple(kept.get("stop_token_ids") or ()),
        str(version.chat.get("content_format") or "string"),
        kept.get("tokens") or {},
        version.tenant,
    )


# Of the call, or the question about tokens, that vLLM's front end works on.
current_manner: contextvars.ContextVar[Manner | None] = contextvars.ContextVar(
    "loraplex_manner", default=None
)

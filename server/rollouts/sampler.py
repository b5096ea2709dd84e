"""A few prompts of a rollout's requests, kept encrypted until they are replayed.

Only of tenants that have agreed (``sample_prompts``), only while a rollout of the adapter goes on, and only
where the settings have a key. What is kept is encrypted before it leaves memory, and is nowhere in a log.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from adapters.store.prompts import Prompts
from adapters.store.rollouts import Stored
from server.inference.completion import Order
from server.inference.dialects.base import Dialect
from server.rollouts.guards import REPLAYED

logger = logging.getLogger(__name__)

# Of a rollout one prompt is taken in so many seconds on average, at random moments, and no more wait at once.
EVERY_S = 2.0
MOST_WAITING = 20
# Replayed prompts after which no more are taken, unless a guard may still need them.
ENOUGH = 300
MOST_BYTES = 64 << 10
_NONCE = 12


class Cipher:
    """AES-256-GCM with a key that is derived from the settings' ``secret``."""

    def __init__(self, secret: str) -> None:
        derived = HKDF(SHA256(), 32, None, b"loraplex prompts of rollouts").derive(secret.encode())
        self._cipher = AESGCM(derived)
        self.name = hashlib.sha256(b"name of " + derived).hexdigest()[:16]

    def seal(self, rollout: str, prompt: Mapping[str, Any]) -> bytes:
        """``prompt``, encrypted for ``rollout`` alone."""
        nonce = os.urandom(_NONCE)
        return nonce + self._cipher.encrypt(nonce, json.dumps(prompt).encode(), rollout.encode())

    def open(self, rollout: str, sealed: bytes) -> dict[str, Any] | None:
        """What was sealed; None for another key's, another rollout's, or what was changed since."""
        try:
            plain = self._cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], rollout.encode())
        except InvalidTag:
            return None
        found: dict[str, Any] = json.loads(plain)
        return found


@dataclass(slots=True)
class _Wanted:
    """``due`` is when the next prompt is to be taken, by the loop's clock."""

    rollout: str
    due: float


class Sampler:
    """Takes prompts of requests to adapters that are being rolled out. ``secret`` None: it takes none."""

    def __init__(
        self,
        prompts: Prompts,
        secret: str | None,
        *,
        every: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.prompts = prompts
        self.cipher = Cipher(secret) if secret is not None else None
        self.wanted: dict[tuple[str, str], _Wanted] = {}
        self._every = every
        self._clock = clock
        self._random = random.Random()  # noqa: S311  # when a prompt is taken is no secret
        self._writing: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Removes what another key has encrypted, and what no rollout needs any more."""
        removed = await self.prompts.forget(self.cipher.name if self.cipher is not None else None)
        if removed:
            logger.info("removed %d prompts of rollouts that are over, or of another key", removed)

    def watch(self, rollouts: Iterable[Stored]) -> None:
        """Takes prompts of these from now on, and of no others."""
        if self.cipher is None:
            return
        before, self.wanted = self.wanted, {}
        for stored in rollouts:
            if stored.document["share"] and _wants(stored):
                where = stored.tenant, stored.adapter
                known = before.get(where)
                same = known is not None and known.rollout == stored.id
                self.wanted[where] = known if known and same else _Wanted(stored.id, self._next())

    def take(self, order: Order) -> None:
        """Keeps the order's prompt if it is time for one; at once, and writes it later."""
        if (
            order.version is None
            or not order.tenant.sample_prompts
            or order.version.tenant != order.tenant.id
        ):
            return
        wanted = self.wanted.get((order.tenant.id, order.version.adapter))
        if wanted is None or self._clock() < wanted.due or self.cipher is None:
            return
        prompt = prompt_of(order.dialect, order.fields)
        if prompt is None:
            return
        wanted.due = self._next()
        sealed = self.cipher.seal(wanted.rollout, prompt)
        task = asyncio.create_task(self._keep(wanted.rollout, sealed), name="loraplex-prompt")
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def stop(self) -> None:
        """Ends what is being written."""
        for task in self._writing:
            task.cancel()
        await asyncio.gather(*self._writing, return_exceptions=True)

    def _next(self) -> float:
        return self._clock() + self._random.expovariate(1 / self._every)

    async def _keep(self, rollout: str, sealed: bytes) -> None:
        assert self.cipher is not None
        try:
            await self.prompts.keep(rollout, sealed, self.cipher.name, MOST_WAITING)
        except Exception as exc:  # the database is away: without this prompt, then
            logger.warning("a prompt of the rollout %s was not kept: %s", rollout, type(exc).__name__)


def _wants(stored: Stored) -> bool:
    guards = stored.document["guards"]
    if any(guards.get(name) is not None for name in REPLAYED):
        return True
    replays = (stored.evidence or {}).get("replays") or {}
    return bool(replays.get("prompts", 0) < ENOUGH)


def prompt_of(dialect: Dialect, fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """What of a request is replayed; None where it cannot be: several prompts, images, too long."""
    names = dialect.replayed_fields
    if not names:
        return None
    prompt = {name: fields[name] for name in names if name in fields}
    given = prompt.get("prompt")
    if isinstance(given, list) and not all(isinstance(token, int) for token in given):
        if len(given) != 1 or not isinstance(given[0], str):
            return None
        prompt["prompt"] = given[0]
    if not all(_is_text(message) for message in prompt.get("messages", ())):
        return None
    small = len(str(prompt)) <= MOST_BYTES
    return {"dialect": dialect.name, "fields": prompt} if small else None


def _is_text(message: Any) -> bool:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        return all(isinstance(part, dict) and part.get("type") == "text" for part in content)
    return True

"""Prompts that were kept, answered again by both versions, and how far the answers are apart.

    live   the live version's likeliest answer, token by token
    new    the new version's
    scored what the new version makes of the live one's answer: each token's probability, and the likeliest

A replay is a request like any other, of the prompt's tenant, with the priority ``batch``, one at a time: it
waits for its turn and is in the metrics. It is in no usage record, and no limit or budget of the tenant
counts it: the operator's rollout asks for it, not the customer.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.errors import AdapterNotFound
from adapters.inspection.logprobs import Step, compare
from adapters.model import Version
from adapters.store.prompts import Kept
from adapters.store.rollouts import Stored
from server.accounts.authentication import Authentication
from server.accounts.tenants import Tenant
from server.errors import BadRequest, ServerError, TooManyRequests, Unavailable
from server.inference.completion import Completion, Completions, Order, new_request_id
from server.inference.dialects.registry import DIALECTS
from server.rollouts.sampler import Sampler
from server.scheduling.lease import Lease

logger = logging.getLogger(__name__)

ANSWER_TOKENS = 64
TOP = 20
# Of one answer, with one wait for its turn.
TIMEOUT_S = 600.0
# Replays of one prompt that may break off; then it is given up: it might be what breaks them.
MOST_TRIES = 3
# A prompt that gets no turn is not what breaks its replay, so it is no try; it waits where it is.
NO_ROOM = ("queue_timeout", "rate_limit_exceeded", "server_overloaded", "no_replica")
ASK_AGAIN_S = 2.0
# A token's drift counts at most so much, in nats: an engine's "never" is not a number.
MOST_DRIFT = 20.0
_ID = "token_id:"


class Gone(Exception):
    """The prompt is not kept any more."""


class Unbilled:
    """What the replay of ``prompt`` reserves: nothing. ``tokens`` are those that it has used."""

    refused: ServerError | None = None
    limits_tokens = False

    def __init__(self, prompt: int = 0) -> None:
        self.prompt = prompt
        self.tokens = 0

    async def reserve(self, prompt_tokens: int, output_tokens: int, *, elastic: bool = False) -> None:
        """As of ``Reservation``; so are the others."""

    def asks(self, prompt_tokens: int, output_tokens: int, sequences: int) -> None:
        pass

    async def settle(self) -> int | None:
        return None

    def withdraw(self) -> None:
        pass

    def progressed(self, lease: Lease) -> None:
        pass

    def closed(self, lease: Lease) -> None:
        self.tokens += lease.prompt_tokens + lease.output_tokens


@dataclass(frozen=True, slots=True)
class Said:
    """Tokens by id, the log-probability of each, and the likeliest at its place."""

    tokens: Sequence[int]
    log_probs: Sequence[float]
    steps: Sequence[Step]


def compared(live: Said, new: Said, scored: Said) -> dict[str, Any]:
    """``drift`` is the mean change of a token's log-probability, ``divergence`` the mean of KL(live || new)
    of the next token, both in nats over the live version's answer; of the latter the true one is not smaller.
    ``changed`` is 1 where the likeliest answers differ. ValueError for what are no numbers.
    """
    apart = [abs(a - b) for a, b in zip(live.log_probs, scored.log_probs, strict=True)]
    divergence = compare([live.steps], [scored.steps]).kl
    if not all(map(math.isfinite, (*apart, divergence))):
        raise ValueError("the engine's log-probabilities are not numbers")
    drift = sum(min(one, MOST_DRIFT) for one in apart) / max(1, len(apart))
    return {"drift": drift, "divergence": divergence, "changed": int(live.tokens != new.tokens)}


class Replayer:
    """Replays what ``sampler`` keeps. ``engine`` says how many log-probabilities it gives, if it is here."""

    def __init__(
        self, sampler: Sampler, completions: Completions, authentication: Authentication, engine: Any
    ) -> None:
        self.sampler = sampler
        self._completions = completions
        self._authentication = authentication
        self._engine = engine

    @property
    def possible(self) -> bool:
        """Whether prompts can be kept and replayed here at all."""
        if self.sampler.cipher is None:
            return False
        try:
            return not self._completions.answers.base.pooling
        except Unavailable:  # a gateway that has heard of no replica yet
            return True

    async def replay(self, stored: Stored) -> None:
        """One prompt after another, until none waits or the engine has no room."""
        prompts, metrics = self.sampler.prompts, self._completions.metrics
        while (kept := await prompts.next(stored.id)) is not None:
            used = Unbilled(kept.id)
            try:
                found = await self._tried(stored, kept, used)
            except Gone:
                continue
            if found is None:
                return
            await prompts.replayed(kept.id, found | {"tokens": used.tokens})
            metrics.replayed("failed" if "failed" in found else "compared", used.tokens)

    async def _tried(self, stored: Stored, kept: Kept, used: Unbilled) -> dict[str, Any] | None:
        """What its replay has found; None if it is to be tried again. No message of an error is kept or
        logged: it may quote the prompt."""
        assert self.sampler.cipher is not None
        opened = self.sampler.cipher.open(stored.id, kept.sealed)
        if opened is None:
            return {"failed": "key"}
        try:
            return await self._one(stored, opened, used)
        except Gone:
            raise
        except (BadRequest, AdapterNotFound, ValueError) as exc:
            return {"failed": getattr(exc, "code", None) or "not_numbers"}
        except Exception as exc:  # an engine that was lost, or what nobody has thought of
            code = getattr(exc, "code", None) or type(exc).__name__
            logger.info("a replay of the rollout %s broke off: %s", stored.id, code)
            return {"failed": code} if kept.tries >= MOST_TRIES else None

    async def _one(self, stored: Stored, opened: Mapping[str, Any], used: Unbilled) -> dict[str, Any]:
        tenant = (await self._authentication.acting(stored.tenant, None)).in_background()
        catalog, before = self._completions.catalog, stored.document["live"]
        first, second = [
            await catalog.version(stored.tenant, stored.adapter, number)
            for number in (before, stored.version)
        ]
        asked, other = await self._tokens(opened, first), await self._tokens(opened, second)
        if max(len(asked), len(other)) + 2 * ANSWER_TOKENS > self._completions.answers.max_model_len:
            return {"failed": "too_long"}
        live = await self._ask(tenant, first, asked, used)
        new = await self._ask(tenant, second, other, used)
        scored = new
        if live.tokens != new.tokens:
            whole = await self._ask(tenant, second, [*other, *live.tokens], used, echo=True)
            at, end = len(other), len(other) + len(live.tokens)
            scored = Said(whole.tokens[at:end], whole.log_probs[at:end], whole.steps[at:end])
        return compared(live, new, scored)

    async def _tokens(self, opened: Mapping[str, Any], version: Version) -> list[int]:
        """The prompt as ``version`` is given it: by its own chat template, if it has one."""
        fields = opened["fields"]
        if isinstance(fields.get("prompt"), list):
            return list(fields["prompt"])
        dialect = DIALECTS["tokenize"]
        answers = self._completions.answers
        tokens: list[int] = (await answers.tokens(dialect, dialect.allowed_fields(fields), version))["tokens"]
        return tokens

    async def _ask(
        self, tenant: Tenant, version: Version, prompt: list[int], used: Unbilled, *, echo: bool = False
    ) -> Said:
        dialect = DIALECTS["completion"]
        most = 1 if echo else ANSWER_TOKENS
        body = {
            "prompt": prompt,
            "echo": echo,
            "max_tokens": most,
            "temperature": 0,
            "logprobs": min(TOP, getattr(self._engine, "max_logprobs", TOP)),
            "return_tokens_as_token_ids": True,
        }
        order = Order(
            id=new_request_id(),
            tenant=tenant,
            dialect=dialect,
            fields=dialect.allowed_fields(body),
            version=version,
            public_model=version.adapter,
            reservation=used,
            prompt_bound=len(prompt) + 1,
            prompt_tokens=len(prompt),
            elastic=False,
        )
        opened = await self._in_turn(order, used)
        return said_of(opened.document["choices"][0]["logprobs"])

    async def _in_turn(self, order: Order, used: Unbilled) -> Completion:
        """The answer, however often the wait for a turn ends without one.

        Beside others who always wait a replay has one token in a hundred: where each of its requests waits
        longer than a queue lasts, one that began anew every time would never end. Raises Gone.
        """
        while True:
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    return await self._completions.answers.open(order)
            except (TooManyRequests, Unavailable) as exc:
                if exc.code not in NO_ROOM:
                    raise
            await asyncio.sleep(ASK_AGAIN_S)
            if not await self.sampler.prompts.is_kept(used.prompt):
                raise Gone


def said_of(logprobs: Mapping[str, Any]) -> Said:
    """OpenAI's lists of a completion whose tokens are named by their ids."""
    tokens = [int(name.removeprefix(_ID)) for name in logprobs["tokens"]]
    given = [math.nan if one is None else one for one in logprobs["token_logprobs"]]
    return Said(tokens, given, [step or {} for step in logprobs["top_logprobs"]])

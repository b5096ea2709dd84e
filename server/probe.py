"""A new version beside the base, through the real engine: does it answer with numbers, and does it differ?

A probe is a request like any other, of a customer that nobody can be (``TENANT``): it waits in the fair
queue, needs a slot for a few tokens, and is counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from adapters.errors import AdapterRejected, AdapterUnavailable, fault
from adapters.model import Manifest, Version
from adapters.probes import PROMPTS, Scores, compare, finite
from server.dispatcher import Dispatcher, Lease
from server.engine import Call, Engine, EngineDied, InFlight
from server.errors import BadRequest, Internal, TooManyRequests, Unavailable

TENANT = "_server"  # not a tenant's id, see adapters.model.is_tenant_id
TIMEOUT = 120.0
_TOP = 20


class Prober:
    """Asks the engine; the base's answers are kept from the first probe on."""

    def __init__(self, engine: Engine, dispatcher: Dispatcher) -> None:
        self._engine = engine
        self._dispatcher = dispatcher
        self._base: Scores | None = None

    async def probe(self, version: Version, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What ``version``, which needs no row of the catalog, changes in the base's answers; as JSON.

        ``effect`` says whether that is more than the base differs from itself (``noise``); for the numbers
        see ``Difference``. ``known`` is returned if it is of the same files, on the same base.

        AdapterRejected (``weights_not_finite``) if it answers with NaN. AdapterUnavailable where it gets no
        turn within ``TIMEOUT`` seconds or cannot be loaded, Unavailable where the server is stopping: nothing
        is said about the version then.
        """
        base = {"fingerprint": self._engine.base.fingerprint, "dtype": self._engine.lora_dtype}
        if known is not None and known["base"] == base:
            return dict(known)
        try:
            async with asyncio.timeout(TIMEOUT):
                if self._base is None:
                    self._base = await self._score(None)
                again = await self._score(None)
                scores = await self._score(version)
        except (TimeoutError, TooManyRequests, AdapterUnavailable) as exc:
            raise AdapterUnavailable(
                "The server found no room to try the adapter, and has not kept it; upload it again later."
            ) from exc
        if not finite(scores):
            raise fault("weights_not_finite", "The engine's answers with this adapter are not numbers.")
        changed, noise = compare(again, scores), compare(self._base, again)
        return {"effect": changed.exceeds(noise), **asdict(changed), "noise": asdict(noise), "base": base}

    async def _score(self, version: Version | None) -> Scores:
        lease = await self._dispatcher.submit(
            TENANT,
            version,
            prompt_tokens=self._engine.count_prompt("".join(PROMPTS)),
            max_tokens=len(PROMPTS),
        )
        try:
            scores = [await self._ask(lease, i, prompt) for i, prompt in enumerate(PROMPTS)]
        except EngineDied as exc:
            await lease.close("failed")
            raise Unavailable(
                "The engine has stopped; the server is restarting.", code="engine_stopped"
            ) from exc
        except BaseException:
            await lease.close("failed")
            raise
        await lease.close("completed")
        return scores

    async def _ask(self, lease: Lease, number: int, prompt: str) -> list[dict[str, float]]:
        model = lease.version.key if lease.version else self._engine.base.name
        call = Call(
            id=f"probe-{lease.id}-{number}",
            kind="completion",
            model=model,
            public_model=model,
            cache_salt=TENANT,
            meter=lease,
        )
        lease.work = InFlight(self._engine, call)
        body = {
            "prompt": prompt,
            "echo": True,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": min(_TOP, self._engine.max_logprobs),
            "return_tokens_as_token_ids": True,
        }
        try:
            answer = await self._engine.answer(call, self._engine.parse("completion", body))
        except BadRequest as exc:
            raise Internal(f"The engine does not take the server's own probe: {exc.message}") from exc
        assert answer.body is not None
        steps = answer.body["choices"][0]["logprobs"]["top_logprobs"]
        return [step for step in steps if step is not None]


def no_effect(manifest: Manifest, probe: Mapping[str, Any]) -> AdapterRejected:
    """The refusal of a version whose ``probe`` shows nothing, with what its inspection knows about why."""
    change = max(probe["log_prob"], probe["noise"]["log_prob"])
    largest = max((row.norm[1] for row in manifest.coverage), default=0.0)
    facts = [
        f"In the engine no log-probability changes by more than {change:.1g}, which is nothing",
        f"the largest norm of what it adds to a weight is {largest:.2g}, in {probe['base']['dtype']}",
        *manifest.warnings,
    ]
    return fault("adapter_no_effect", f"{'; '.join(facts)}.")

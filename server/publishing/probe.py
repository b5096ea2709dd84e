"""A new version beside the base, through the real engine: does it answer with numbers, and does it differ?

A probe is a request like any other, of a customer that nobody can be (``TENANT``): it waits in the fair
queue, needs a slot for a few tokens, and is counted.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from operator import itemgetter
from typing import Any

from adapters.errors import AdapterRejected, AdapterUnavailable, fault
from adapters.inspection.golden import Agreement, Golden, held_exactly
from adapters.inspection.logprobs import PROMPTS, Scores, Vectors, compare, finite, finite_vectors, shift
from adapters.model import TEMPLATE_FILE, Manifest, Version
from server.engine.calls import Call, EngineDied, InFlight, Kind
from server.engine.engine import Engine
from server.engine.manners import Manners
from server.errors import BadRequest, Internal, TooManyRequests
from server.scheduling.dispatcher import Dispatcher
from server.scheduling.lease import Lease
from server.scheduling.nouns import Ask, together
from server.scheduling.refusals import engine_restarting

TENANT = "_server"  # not a tenant's id, see adapters.model.is_tenant_id
TIMEOUT = 120.0
_TOP = 20
_NO_ROOM = "The server found no room to try the adapter, and has changed nothing; try it again later."


class Prober:
    """Asks the engine; the base's answers are kept from the first probe on."""

    def __init__(self, engine: Engine, dispatcher: Dispatcher) -> None:
        self._engine = engine
        self._dispatcher = dispatcher
        self._base: Any = None
        self._manners = Manners()

    @property
    def here(self) -> dict[str, str | None]:
        """What an answer depends on besides the adapter."""
        engine = self._engine
        return {"base": engine.base.fingerprint, "dtype": engine.lora_dtype, "engine": engine.version}

    @property
    def golden_here(self) -> dict[str, str | None]:
        """What an answer to golden probes depends on; to the last bit where there is a ``device``."""
        device = self._engine.exact_on
        return self.here if device is None else {**self.here, "device": device}

    def held(self, agreement: Agreement, earlier: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """``agreement`` as the report of a version, of which ``earlier`` was kept."""
        here = self.golden_here
        if "device" not in here:
            return agreement.as_json() | here
        return held_exactly(agreement.as_json(), agreement.bits, earlier, here)

    async def probe(self, version: Version, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What ``version``, which needs no row of the catalog, changes in the base's answers; as JSON.

        ``effect`` says whether that is more than the base differs from itself (``noise``); for the numbers
        see ``Difference``, and ``Shift`` where the base makes embeddings. ``known``, of the same files, is
        returned if nothing has changed here since.

        AdapterRejected (``weights_not_finite``) if it answers with NaN. AdapterUnavailable where it gets no
        turn within ``TIMEOUT`` seconds or cannot be loaded, Unavailable where the server is stopping: nothing
        is said about the version then.
        """
        here = self.here
        if known is not None and known.items() >= here.items():
            return dict(known)
        pooling = self._engine.base.pooling
        say: Any = self._vectors if pooling else self._top
        sound: Any = finite_vectors if pooling else finite
        differ: Any = shift if pooling else compare
        try:
            async with asyncio.timeout(TIMEOUT):
                if self._base is None:
                    self._base = await say(None)
                again = await say(None)
                scores = await say(version)
        except (TimeoutError, TooManyRequests) as exc:
            raise AdapterUnavailable(_NO_ROOM) from exc
        except Internal as exc:
            raise (_not_numbers() if exc.code == "adapter_not_finite" else exc) from exc
        except BadRequest as exc:
            raise Internal(f"The engine does not take the server's own probe: {exc.message}") from exc
        if not sound(scores):
            raise _not_numbers()
        changed, noise = differ(again, scores), differ(self._base, again)
        return {"effect": changed.exceeds(noise), **asdict(changed), "noise": asdict(noise), **here}

    async def chat(self, version: Version) -> None:
        """One token of a chat, through the version's own template; AdapterRejected where that fails."""
        turns = [{"role": "user", "content": "Hello"}]
        try:
            async with asyncio.timeout(TIMEOUT):
                await self._ask(version, "chat", [{"messages": turns, "max_tokens": 1, "temperature": 0}])
        except (TimeoutError, TooManyRequests) as exc:
            raise AdapterUnavailable(_NO_ROOM) from exc
        except BadRequest as exc:
            raise fault("chat_template_invalid", exc.message, param=TEMPLATE_FILE) from exc

    async def check(self, version: Version, golden: Golden) -> Agreement:
        """``golden`` against what the engine says now, each prompt as a request of its own.

        AdapterRejected (``probes_invalid``, ``probe_mismatch``) where the engine does not take a prompt or
        reads it as another number of tokens, or makes embeddings (``probes_unsupported``); otherwise as
        ``probe``.
        """
        if self._engine.base.pooling:
            makes = self._engine.base.makes
            raise fault("probes_unsupported", f"The base model makes {makes}, without log-probabilities.")
        found: list[list[float]] = []
        try:
            async with asyncio.timeout(TIMEOUT):
                for one in golden.probes:
                    (said,) = await self._ask(version, "completion", [_echoed(one.prompt, top=0)])
                    found.append(said["choices"][0]["logprobs"]["token_logprobs"][1:-1])
        except (TimeoutError, TooManyRequests) as exc:
            raise AdapterUnavailable(_NO_ROOM) from exc
        except Internal as exc:
            raise (_not_numbers() if exc.code == "adapter_not_finite" else exc) from exc
        except BadRequest as exc:
            raise fault("probes_invalid", f"The engine refuses prompt {len(found)}: {exc.message}.") from exc
        if not all(map(math.isfinite, itertools.chain(*found))):
            raise _not_numbers()
        return golden.compare(found)

    async def _top(self, version: Version | None) -> Scores:
        top = min(_TOP, self._engine.max_logprobs)
        choices = await self._each(version, "completion", lambda prompts: _echoed(prompts, top), "choices")
        return [choice["logprobs"]["top_logprobs"][1:] for choice in choices]

    async def _vectors(self, version: Version | None) -> Vectors:
        """Embeddings, or a head's scores as they are: a probability hides how far one moves."""
        if self._engine.base.makes == "labels":
            scored = await self._each(
                version, "classification", lambda texts: {"input": texts, "use_activation": False}, "data"
            )
            return [one["probs"] for one in scored]
        embedded = await self._each(version, "embedding", lambda texts: {"input": texts}, "data")
        return [one["embedding"] for one in embedded]

    async def _each(
        self, version: Version | None, kind: Kind, body: Callable[[list[str]], dict[str, Any]], field: str
    ) -> list[dict[str, Any]]:
        """What ``field`` of the answers has for each of ``PROMPTS``, in their order.

        They share the engine's steps, as far as ``together`` goes.
        """
        size = together(len(PROMPTS), self._dispatcher.max_running)
        bodies = [body(list(PROMPTS[i : i + size])) for i in range(0, len(PROMPTS), size)]
        said = await self._ask(version, kind, bodies, sequences=size)
        return [one for answer in said for one in sorted(answer[field], key=itemgetter("index"))]

    async def _ask(
        self, version: Version | None, kind: Kind, bodies: Sequence[dict[str, Any]], *, sequences: int = 1
    ) -> list[dict[str, Any]]:
        """What is answered to each body, one after the other; under one lease for so many sequences."""
        ask = Ask(
            id=self._dispatcher.new_id(TENANT),
            tenant=TENANT,
            version=version.key if version else None,
            prompt_tokens=max(1, sum(len(str(body)) for body in bodies) // 4),
            max_tokens=len(bodies),
            sequences=sequences,
        )
        lease = await self._dispatcher.submit(ask, version)
        try:
            said = [await self._run(lease, i, kind, body) for i, body in enumerate(bodies)]
        except EngineDied as exc:
            await lease.close("failed")
            raise (lease.failure or engine_restarting()) from exc
        except BaseException:
            await lease.close("failed")
            raise
        await lease.close("completed")
        return said

    async def _run(self, lease: Lease, number: int, kind: Kind, body: dict[str, Any]) -> dict[str, Any]:
        model = lease.version.key if lease.version else self._engine.base.name
        call = Call(
            manner=await self._manners.of(lease.version),
            id=f"probe-{lease.id}-{number}",
            kind=kind,
            model=model,
            public_model=model,
            cache_salt=TENANT,
            meter=lease,
        )
        lease.work = InFlight(self._engine, call)
        answer = await self._engine.answer(call, self._engine.parse(kind, body))
        assert answer.body is not None
        return answer.body


def _echoed(prompt: str | list[int] | list[str], top: int) -> dict[str, Any]:
    """Asks for the log-probabilities of a prompt, or of several, and one token more, with ids for tokens."""
    return {
        "prompt": prompt,
        "echo": True,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": top,
        "return_tokens_as_token_ids": True,
    }


def _not_numbers() -> AdapterRejected:
    return fault("weights_not_finite", "The engine's answers with this adapter are not numbers.")


def no_effect(manifest: Manifest, probe: Mapping[str, Any]) -> AdapterRejected:
    """The refusal of a version whose ``probe`` shows nothing, with what its inspection knows about why."""
    measure = "log_prob" if "log_prob" in probe else "change"
    change = max(probe[measure], probe["noise"][measure])
    what = (
        f"no log-probability changes by more than {change:.1g}"
        if measure == "log_prob"
        else f"no embedding moves, nor a head's score, by more than {change:.1g} of its length"
    )
    largest = max((row.norm[1] for row in manifest.coverage), default=0.0)
    facts = [
        f"In the engine {what}, which is nothing",
        f"the largest norm of what it adds to a weight is {largest:.2g}, in {probe['dtype']}",
        *manifest.warnings,
    ]
    return fault("adapter_no_effect", f"{'; '.join(facts)}.")

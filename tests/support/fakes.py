"""An engine without a model: the public face of ``server.engine.engine.Engine``, on the event loop's clock.

It passes ``engine_suite``, which the real engine passes too. Beyond that it watches its caller: what
the real engine would take and then serve wrongly (a version that is not in a slot, a slot emptied under a
running request, an id used twice) ends in ``violations``, which every test asserts to be empty.

Its answers are countable: token 0 is the name of the folder that the adapter was loaded from (a digest, for
blobs), or ``base``; token ``i`` is the number ``i``. Its log-probabilities, which it has for completions, are
moved by an adapter as far as the product of its real matrices goes.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import math
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from adapters.model import CONFIG_FILE, WEIGHTS_FILE, BaseModel
from server.engine.calls import Answer, Call, EngineDied, Kind, PageOp, PageReport, WorkerReport
from server.engine.engine import Engine
from server.engine.errors import from_vllm, named, request_errors
from server.engine.parsers import Parsers
from server.engine.serving import raise_errors
from server.engine.sizing import EngineCapacity
from server.errors import BadRequest, TooManyRequests, Unavailable
from server.inference.dialects.registry import DIALECTS
from tests.support import fake_dialects, fake_embeddings
from tests.support.fake_answers import (
    NATURAL_LENGTH,
    VOCABULARY,
    Run,
    chat_events,
    checked,
    completion_events,
    error_event,
    finish_of,
    head,
    length_of,
    prompts_of,
    text_of,
    usage_of,
)
from tests.support.fake_embeddings import POOLED, labels_of
from tests.support.fake_slots import FakeSlots, Times, read_adapter

__all__ = ["FakeEngine", "Times", "log_probs", "push_of"]

BASE_NAME = "base"


def push_of(folder: Path) -> float:
    """How far the adapter in ``folder`` moves a log-probability: by its matrices, as float32 has them."""
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    with safe_open(folder / WEIGHTS_FILE, "np") as file, np.errstate(over="ignore", invalid="ignore"):
        tensors = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
        products = [b @ tensors[n.replace("_B", "_A")] for n, b in tensors.items() if "lora_B" in n]
        moved = sum(np.abs(product).mean() for product in products)
        return float(np.float32(1) + np.float32(moved * config["lora_alpha"] / config["r"])) - 1


@functools.lru_cache(10_000)  # each upload asks for the base's again
def log_probs(prompt: str, at: int, push: float, owner: str) -> tuple[float, ...]:
    """Of each token of the vocabulary, after ``at`` tokens of ``prompt``."""
    logits = []
    for token in range(VOCABULARY):
        seed = hashlib.sha256(f"{prompt} {at} {token}".encode()).digest()
        turn = hashlib.sha256(f"{owner} {at} {token}".encode()).digest()
        logits.append(seed[0] / 50 + push * (turn[0] - 128) / 32)
    highest = max(logits)
    total = math.log(sum(math.exp(logit - highest) for logit in logits)) + highest
    return tuple(logit - total for logit in logits)


class FakeEngine(FakeSlots):
    lora_dtype = "float32"
    exact_on: str | None = None
    parsers = Parsers("hermes", None, tools_shown=True)
    max_logprobs = 20
    vocabulary = 49152
    version = "fake 1"
    parse = Engine.parse
    parse_in_turns = Engine.parse_in_turns
    resumable = Engine.resumable
    check_structure = Engine.check_structure
    _grammars = None

    def __init__(
        self,
        base: BaseModel,
        *,
        gpu_slots: int = 2,
        host_slots: int = 4,
        max_running: int = 8,
        max_model_len: int = 512,
        times: Times | None = None,
        read: Callable[[Path], int] = read_adapter,
    ) -> None:
        super().__init__(gpu_slots=gpu_slots, host_slots=host_slots, times=times or Times(), read=read)
        self.base = base
        self._dialects = DIALECTS
        self.capacity = EngineCapacity(gpu_slots, host_slots, slot_bytes=1 << 20, entry_bytes=1 << 19)
        self.max_running = max_running
        self.max_model_len = max_model_len
        self.calls: list[Call] = []
        self.ops: list[PageOp] = []
        self.paused: list[Run] = []
        self.most_running = 0
        self.stopped = False
        # (HTTP status, tokens): every stream breaks with it after so many tokens.
        self.break_streams: tuple[int, int] | None = None
        self._died: EngineDied | None = None
        self._hung = asyncio.Event()  # set while it answers
        self._hung.set()
        self._on_lost: Callable[[EngineDied], None] = lambda _: None
        self.starts_fail = 0  # so many restarts fail
        self.lives = 1
        self._words = [""]  # by token id; 0 begins every prompt

    # --- what tests do to it ---------------------------------------------------------------------

    def die(self) -> None:
        """Its process ends. Streams hear of it at their next token, paging at its next call."""
        self._died = EngineDied("the engine process is gone")

    def hang(self) -> None:
        """It answers nothing any more, until ``kill``."""
        self._hung.clear()

    # --- the engine's public face ----------------------------------------------------------------

    async def check(self) -> None:
        self._alive()

    async def stop(self) -> None:
        self.stopped = True

    def watch(self, on_lost: Callable[[EngineDied], None]) -> None:
        self._on_lost = on_lost

    def detach(self, reason: str) -> None:
        for run in list(self.running):
            if run.call.resumable:
                run.call.paused = True
                run.going.clear()
                self.running.remove(run)
                self.paused.append(run)
            else:
                run.lost = EngineDied(reason)
        self._host.clear()
        self._staging.clear()
        self._slots = [None] * len(self._slots)

    async def kill(self) -> None:
        self._died = self._died or EngineDied("it was killed")
        self._hung.set()

    async def restart(self) -> None:
        await asyncio.sleep(self.times.start)
        if self.starts_fail:
            self.starts_fail -= 1
            raise RuntimeError("it does not start")
        self._died = None
        self.lives += 1

    async def page(self, ops: Sequence[PageOp]) -> PageReport:
        self._alive()
        await self._hung.wait()
        takes = self.times.page + self.times.activate * sum(op.verb == "activate" for op in ops)
        await asyncio.sleep(takes)
        self._alive()
        self.ops += ops
        return PageReport(tuple(self._carry_out(op) for op in ops), tuple(self._collect()))

    def listen(self, on_notice: Callable[[], None]) -> bool:
        self._on_notice = on_notice
        return self.tells

    async def report(self) -> WorkerReport:
        self._alive()
        await self._hung.wait()
        await asyncio.sleep(self.times.page)
        self._alive()
        return WorkerReport(frozenset(self._host), tuple(self._slots), frozenset(self._staging), 0)

    async def answer(self, call: Call, request: Any) -> Answer:
        self._alive()
        self.calls.append(call)
        if not call.cache_salt or len(call.cache_salt) > 128 or set(call.cache_salt) & set("@/\\\0"):
            self._violated(f"cache salt {call.cache_salt!r}")
        if call.kind == "messages":
            with request_errors():
                request = fake_dialects.as_chat(request)
        if POOLED.get(call.kind, "text") != self.base.makes:
            self._violated(f"{call.kind} is asked of another kind of model")
        try:
            run = self._run_of(call, request)
        except BadRequest as exc:
            raise named(exc, self._dialects[call.kind].prompt_field) from None
        prompt = self._dialects[call.kind].prompt_field
        if call.kind in POOLED:
            return Answer(body=await self._embed(run))
        if request.stream:
            events = completion_events if call.kind == "completion" else chat_events
            if call.kind == "responses":
                chunks = fake_dialects.stream(call, self._sse(run, events, True))
                return Answer(stream=raise_errors(call, prompt, chunks))
            include_usage = bool(request.stream_options and request.stream_options.include_usage)
            chunks = self._sse(run, events, include_usage)
            chunks = fake_dialects.stream(call, chunks) if call.kind == "messages" else chunks
            return Answer(stream=raise_errors(call, prompt, chunks))
        async for i in self._produce(run):
            del i
            if self.break_streams and self._due_to_break(run):
                raise from_vllm("it broke", self.break_streams[0], None)
        run.settle()
        body = self._body(run)
        return Answer(
            body=body if call.kind in ("chat", "completion") else fake_dialects.document(call, body)
        )

    async def tokens(self, kind: Kind, request: Any, manner: Any = None) -> dict[str, Any]:
        self._alive()
        if kind == "detokenize":
            if max(request.tokens, default=0) >= len(self._words):
                raise BadRequest("a token is not in the vocabulary", param="tokens")
            return {"prompt": " ".join(self._words[i] for i in request.tokens if i)}
        if kind == "count_tokens":
            with request_errors():
                (prompt,) = prompts_of("chat", fake_dialects.as_chat(request))
            return {"input_tokens": len(prompt.split()) + 1}
        (prompt,) = prompts_of("chat" if hasattr(request, "messages") else "completion", request)
        words = prompt.split()
        self._words += dict.fromkeys(word for word in words if word not in self._words)
        ids = [0, *(self._words.index(word) for word in words)]
        strings = {"token_strs": [self._words[i] for i in ids]} if request.return_token_strs else {}
        return {"tokens": ids, "count": len(ids), "max_model_len": self.max_model_len, **strings}

    async def abort(self, call: Call) -> None:
        for runs in (self.running, self.paused):
            for run in [run for run in runs if run.call is call]:
                run.settle()
                run.aborted = True
                runs.remove(run)
                run.going.set()

    async def pause(self, call: Call) -> bool:
        self._alive()
        runs = [run for run in self.running if run.call is call]
        if not runs or not call.resumable:
            return False
        call.paused = True
        for run in runs:
            self.running.remove(run)
            self.paused.append(run)
            run.going.clear()
        await asyncio.sleep(self.times.page)
        return True

    async def resume(self, call: Call) -> None:
        self._alive()
        for run in [run for run in self.paused if run.call is call]:
            self.paused.remove(run)
            self.running.append(run)
            call.paused = False
            run.load_id = self._load_of(call.model)
            run.going.set()

    async def give_up(self, call: Call, reason: str) -> None:
        for run in [run for run in self.paused if run.call is call]:
            self.paused.remove(run)
            run.settle()
            run.given_up = reason
            run.going.set()

    def poll(self, call: Call) -> None:
        for run in self.running:
            if run.call is call:
                run.settle()

    # --- answers ---------------------------------------------------------------------------------

    def _run_of(self, call: Call, request: Any) -> Run:
        load_id = self._load_of(call.model)
        shown = BASE_NAME if load_id is None else Path(self._loads[load_id].path).name
        if call.kind == "responses":
            limit = request.max_output_tokens
        elif call.kind in POOLED:
            limit = 1
        else:
            limit = getattr(request, "max_completion_tokens", None) or request.max_tokens
        with request_errors():
            prompts = [checked(text, self.max_model_len) for text in prompts_of(call.kind, request)]
            if call.kind in POOLED:
                fake_embeddings.check(request)
            else:
                params = request.to_sampling_params(NATURAL_LENGTH if limit is None else limit, {})
                if (params.logprobs or 0) > self.max_logprobs:
                    raise ValueError(f"logprobs: at most {self.max_logprobs} can be asked for")
        room = self.max_model_len - max(prompts)
        natural_end = limit is None
        limit = min(room, NATURAL_LENGTH if limit is None else limit)
        n = getattr(request, "n", None) or 1
        run = Run(call, load_id, shown, prompts, n, limit, natural_end, request)
        for i in range(len(prompts)):
            call.request_ids.append(f"{call.id}-{i}")
            run.produced[call.request_ids[-1]] = 0
        if call.admission is not None:
            for prompt in prompts:
                left = self.max_model_len - prompt
                most = 0 if call.kind in POOLED else n * (left if natural_end else min(limit, left))
                call.admission.asks(prompt, most, 0 if call.kind in POOLED else n)
        return run

    def _load_of(self, model: str) -> int | None:
        if model == self.base.name:
            return None
        for load_id in self._slots:
            if load_id is not None and self._loads[load_id].name == model:
                return load_id
        self._violated(f"{model} is to be run but has no slot")
        raise AssertionError(self.violations[-1])

    async def _produce(self, run: Run, said: int = 0) -> AsyncIterator[int]:
        """Token numbers, one step each beyond the first ``said``; ends early when the call is aborted."""
        if run.call.admission is not None:
            most = await run.call.admission.settle()
            run.limit = run.limit if most is None else min(run.limit, most)
        run.going.set()
        self.running.append(run)
        self.most_running = max(self.most_running, sum(other.sequences for other in self.running))
        if self.most_running > self.max_running:
            self._violated(f"{self.most_running} sequences run at once")
        try:
            for i in range(run.limit):
                if i >= said:
                    await asyncio.sleep(self.times.until_next())
                await self._hung.wait()
                if self._died is not None:
                    self._on_lost(self._died)
                await run.going.wait()
                if run.lost is not None:
                    raise run.lost
                if run.given_up is not None:
                    raise from_vllm(run.given_up, 503, None)
                if run.aborted:
                    return
                if run.load_id is not None and run.load_id not in self._slots:
                    self._violated(f"load {run.load_id} runs without a slot")
                for part in run.produced:
                    run.produced[part] += run.choices
                yield i
            if run.call.kind not in POOLED:
                run.call.meter.finished([finish_of(run, run.limit - 1)])
        finally:
            run.settle()
            for runs in (self.running, self.paused):
                if run in runs:
                    runs.remove(run)

    async def _sse(
        self, run: Run, events: Callable[[Run, int], list[dict[str, Any]]], include_usage: bool
    ) -> AsyncIterator[str]:
        last, relay = -1, run.call.relay
        said = 0 if relay is None else len(relay.said)
        if relay is not None:
            movable = run.call.resumable and run.sequences == 1
            relay.begins(movable)
            if said and not movable:
                run.call.failure = Unavailable("it cannot go on", code="replica_lost")
                yield error_event("it cannot go on", 503)
                return
        try:
            async for i in self._produce(run, said):
                run.settle()
                if relay is not None and i >= said:
                    if i:
                        await relay.flush()
                    relay.produced([i], sum(run.prompts), 0)
                elif relay is not None and i == 0:  # what was said comes as one output
                    relay.produced(relay.said, sum(run.prompts), relay.cached)
                if self.break_streams and self._due_to_break(run):
                    yield error_event("it broke", self.break_streams[0])
                    yield "data: [DONE]\n\n"
                    return
                last = i
                for event in events(run, i):
                    yield f"data: {json.dumps(event)}\n\n"
        except EngineDied:
            yield error_event("the engine is dead", 500)
        except Unavailable as exc:
            yield error_event(exc.message, 503)
        except TooManyRequests:
            yield error_event("Internal server error", 500)
        if run.aborted:
            for event in events(run, last + 1):
                event["choices"][0]["finish_reason"] = "abort"
                yield f"data: {json.dumps(event)}\n\n"
        if include_usage:
            yield f"data: {json.dumps({**head(run, stream=True), 'choices': [], 'usage': usage_of(run)})}\n\n"
        yield "data: [DONE]\n\n"

    def _due_to_break(self, run: Run) -> bool:
        assert self.break_streams is not None
        return min(run.produced.values()) > self.break_streams[1]

    def _body(self, run: Run) -> dict[str, Any]:
        tokens = min(run.produced.values()) // run.choices
        text = run.text(tokens)
        finish = "abort" if run.aborted else finish_of(run, tokens - 1)
        choices: list[dict[str, Any]] = []
        for i in range(run.sequences):
            if run.call.kind != "completion":
                said = {"message": {"role": "assistant", "content": text}, "logprobs": None}
            else:
                prompt = prompts_of("completion", run.request)[i // run.choices]
                echoed = text_of(prompt) if run.request.echo else ""
                said = {"text": echoed + text, "logprobs": self._log_probs(run, prompt, tokens)}
            choices.append({"index": i, **said, "finish_reason": finish})
        return {**head(run, stream=False), "choices": choices, "usage": usage_of(run)}

    async def _embed(self, run: Run) -> dict[str, Any]:
        async for _ in self._produce(run):
            pass
        if run.aborted:
            raise Unavailable("it was cut off", code="shutting_down", retry_after=5)
        push = 0.0 if run.load_id is None else push_of(Path(self._loads[run.load_id].path))
        vectors = [
            log_probs(text_of(prompt), length_of(prompt), push, run.shown)
            for prompt in prompts_of("embedding", run.request)
        ]
        if run.call.kind != "embedding":
            assert self.base.head is not None
            own = None if run.load_id is None else labels_of(Path(self._loads[run.load_id].path))
            labels = self.base.head.labels if own is None else own
            if run.call.kind == "score":
                if labels != 1:
                    self._violated(f"a score is asked of {labels} labels")
                return fake_embeddings.scored(run.call, vectors, run.request, sum(run.prompts))
            return fake_embeddings.classified(run.call, run.request, vectors, sum(run.prompts), labels)
        return fake_embeddings.document(run.call, run.request, vectors, sum(run.prompts))

    def _log_probs(self, run: Run, prompt: str | list[int], tokens: int) -> dict[str, Any] | None:
        """OpenAI's lists; with tokens as ids, which is how the probe asks."""
        top = run.request.logprobs
        if top is None:
            return None
        push = 0.0 if run.load_id is None else push_of(Path(self._loads[run.load_id].path))
        length = length_of(prompt)
        ids = prompt if isinstance(prompt, list) else [i % VOCABULARY for i in range(length)]
        steps: list[dict[str, float] | None] = []
        names = []
        for at in range(0 if run.request.echo else length, length + tokens):
            known = log_probs(text_of(prompt), at, push, run.shown)
            best = sorted(range(VOCABULARY), key=known.__getitem__, reverse=True)
            actual = ids[at] if at < length else best[0]
            names.append(f"token_id:{actual}")
            steps.append({f"token_id:{i}": known[i] for i in dict.fromkeys([actual, *best[:top]])})
        if run.request.echo:
            steps[0] = None
        return {
            "tokens": names,
            "token_logprobs": [step and step[name] for name, step in zip(names, steps, strict=True)],
            "top_logprobs": steps,
            "text_offset": [0] * len(names),
        }

    def _alive(self) -> None:
        if self._died is not None:
            raise self._died

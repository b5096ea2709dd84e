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
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from adapters.model import CONFIG_FILE, WEIGHTS_FILE, BaseModel
from server.engine.calls import (
    Answer,
    Call,
    EngineDied,
    Kind,
    PageOp,
    PageReport,
    PageResult,
    StageResult,
    WorkerReport,
)
from server.engine.engine import Engine
from server.engine.errors import from_vllm, named, request_errors
from server.engine.parsers import Parsers
from server.engine.serving import raise_errors
from server.engine.sizing import EngineCapacity
from server.errors import BadRequest, TooManyRequests, Unavailable
from server.inference.dialects.registry import DIALECTS
from tests.support import fake_dialects, fake_embeddings
from tests.support.fake_embeddings import POOLED, labels_of, pooled_prompts

BASE_NAME = "base"
NATURAL_LENGTH = 8
VOCABULARY = 32


def read_adapter(folder: Path) -> int:
    """Bytes of the adapter in ``folder``; raises what is wrong with it."""
    json.loads((folder / CONFIG_FILE).read_bytes())
    with safe_open(folder / WEIGHTS_FILE, "np") as file:
        return sum(len(bytes(file.get_tensor(name))) for name in file.keys())  # noqa: SIM118


def push_of(folder: Path) -> float:
    """How far the adapter in ``folder`` moves a log-probability: by its matrices, as float32 has them."""
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    with safe_open(folder / WEIGHTS_FILE, "np") as file, np.errstate(over="ignore", invalid="ignore"):
        tensors = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
        products = [b @ tensors[n.replace("_B", "_A")] for n, b in tensors.items() if "lora_B" in n]
        moved = sum(np.abs(product).mean() for product in products)
        return float(np.float32(1) + np.float32(moved * config["lora_alpha"] / config["r"])) - 1


def log_probs(prompt: str, at: int, push: float, owner: str) -> list[float]:
    """Of each token of the vocabulary, after ``at`` tokens of ``prompt``."""
    logits = []
    for token in range(VOCABULARY):
        seed = hashlib.sha256(f"{prompt} {at} {token}".encode()).digest()
        turn = hashlib.sha256(f"{owner} {at} {token}".encode()).digest()
        logits.append(seed[0] / 50 + push * (turn[0] - 128) / 32)
    highest = max(logits)
    total = math.log(sum(math.exp(logit - highest) for logit in logits)) + highest
    return [logit - total for logit in logits]


@dataclass
class Times:
    """Seconds: to read an adapter, to activate one, between two tokens, until a page call begins.

    ``in_step`` if all that runs has its tokens at the same moments, as in an engine.
    """

    stage: float = 0.0
    activate: float = 0.0
    step: float = 0.0
    page: float = 0.0
    start: float = 20.0
    in_step: bool = False

    def until_next(self) -> float:
        """Seconds until the next token."""
        if not self.in_step:
            return self.step
        now = time.monotonic()
        return (round(now / self.step) + 1) * self.step - now


@dataclass
class _Run:
    """A call in the engine. ``produced`` counts output tokens by part."""

    call: Call
    load_id: int | None
    shown: str
    prompts: list[int]
    choices: int
    limit: int
    natural_end: bool
    request: Any
    produced: dict[str, int] = field(default_factory=dict)
    aborted: bool = False
    going: asyncio.Event = field(default_factory=asyncio.Event)
    given_up: str | None = None
    lost: EngineDied | None = None

    @property
    def sequences(self) -> int:
        return self.choices * len(self.prompts)

    def token(self, i: int) -> str:
        return self.shown if i == 0 else f" {i}"

    def text(self, tokens: int) -> str:
        return "".join(self.token(i) for i in range(tokens))

    def settle(self) -> None:
        """Tells the meter all that was produced; needed before an abort forgets it."""
        for prompt, (part, tokens) in zip(self.prompts, self.produced.items(), strict=True):
            if tokens:
                said = 0 if self.call.kind in POOLED else tokens
                self.call.meter.progressed(part, prompt, said, 0)


class FakeEngine:
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
        self.base = base
        self._dialects = DIALECTS
        self.capacity = EngineCapacity(gpu_slots, host_slots, slot_bytes=1 << 20, entry_bytes=1 << 19)
        self.max_running = max_running
        self.max_model_len = max_model_len
        self.times = times or Times()
        self.violations: list[str] = []
        self.calls: list[Call] = []
        self.ops: list[PageOp] = []
        self.running: list[_Run] = []
        self.paused: list[_Run] = []
        self.most_running = 0
        self.stopped = False
        # (HTTP status, tokens): every stream breaks with it after so many tokens.
        self.break_streams: tuple[int, int] | None = None
        self._read = read
        self._host_slots = host_slots
        self._slots: list[int | None] = [None] * gpu_slots
        self._host: set[int] = set()
        self._loads: dict[int, PageOp] = {}
        self._staging: dict[int, float] = {}
        self._evicted_while_staging: set[int] = set()
        self._failures: Counter[tuple[str, str]] = Counter()
        self._died: EngineDied | None = None
        self._hung = asyncio.Event()  # set while it answers
        self._hung.set()
        self._on_lost: Callable[[EngineDied], None] = lambda _: None
        self._on_notice: Callable[[], None] = lambda: None
        self.tells = False  # by itself, when a load has been read
        self.starts_fail = 0  # so many restarts fail
        self.lives = 1
        self._words = [""]  # by token id; 0 begins every prompt

    # --- what tests do to it ---------------------------------------------------------------------

    def fail(self, verb: str, name: str, times: int = 1) -> None:
        """The next ``times`` of this operation on this version fail."""
        self._failures[verb, name] += times

    def lose(self, name: str) -> None:
        """Drops what it holds of a version, behind everybody's back."""
        for load_id in [i for i in self._host if self._loads[i].name == name]:
            self._remove(load_id)

    def plant(self, load_id: int) -> None:
        """Holds a load that nobody asked for."""
        self._loads[load_id] = PageOp("stage", load_id, "stray")
        self._host.add(load_id)

    def die(self) -> None:
        """Its process ends. Streams hear of it at their next token, paging at its next call."""
        self._died = EngineDied("the engine process is gone")

    def hang(self) -> None:
        """It answers nothing any more, until ``kill``."""
        self._hung.clear()

    def held(self, name: str) -> bool:
        return any(self._loads[i].name == name for i in self._host)

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
            events = self._completion_events if call.kind == "completion" else self._chat_events
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
                (prompt,) = _prompts("chat", fake_dialects.as_chat(request))
            return {"input_tokens": len(prompt.split()) + 1}
        (prompt,) = _prompts("chat" if hasattr(request, "messages") else "completion", request)
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

    # --- paging ----------------------------------------------------------------------------------

    def _carry_out(self, op: PageOp) -> PageResult:
        if op.verb == "stage":
            return PageResult(self._stage(op), 0.0)
        if op.verb == "activate":
            return PageResult(self._activate(op.load_id), self.times.activate)
        if op.verb == "deactivate":
            if op.load_id in self._host and self._fails("deactivate", self._loads[op.load_id]):
                return PageResult("RuntimeError: injected", 0.0)
            self._leave_slot(op.load_id)
        elif op.load_id in self._staging:
            self._evicted_while_staging.add(op.load_id)
        else:
            self._remove(op.load_id)
        return PageResult(None, 0.0)

    def _stage(self, op: PageOp) -> str | None:
        if op.load_id in self._loads:
            self._violated(f"load id {op.load_id} is used twice")
        self._loads[op.load_id] = op
        loop = asyncio.get_running_loop()
        due = self._staging[op.load_id] = loop.time() + self.times.stage
        if self.tells:
            loop.call_at(due, self._on_notice)
        return None

    def _collect(self) -> list[StageResult]:
        now = asyncio.get_running_loop().time()
        staged = []
        for load_id in [i for i, due in self._staging.items() if due <= now]:
            del self._staging[load_id]
            if load_id in self._evicted_while_staging:
                self._evicted_while_staging.discard(load_id)
                continue
            error, size = self._outcome(self._loads[load_id])
            if error is None and len(self._host) >= self._host_slots:
                error = "host memory holds max_cpu_loras adapters already"
            if error is not None:
                staged.append(StageResult(load_id, error, 0.0, 0))
                continue
            self._host.add(load_id)
            staged.append(StageResult(load_id, None, self.times.stage, size))
        return staged

    def _outcome(self, op: PageOp) -> tuple[str | None, int]:
        if self._fails("stage", op):
            return "OSError: injected", 0
        try:
            return None, self._read(Path(op.path))
        except Exception as exc:  # as in a staging thread
            return f"{type(exc).__name__}: {exc}", 0

    def _activate(self, load_id: int) -> str | None:
        if load_id not in self._host:
            return f"LookupError: load {load_id} is not in host memory"
        if load_id in self._slots:
            return None
        if None not in self._slots:
            return "LookupError: no slot is free"
        if self._fails("activate", self._loads[load_id]):
            self._remove(load_id)  # as the worker does: half an adapter must not stay
            return "RuntimeError: injected"
        self._slots[self._slots.index(None)] = load_id
        return None

    def _remove(self, load_id: int) -> None:
        self._leave_slot(load_id)
        self._host.discard(load_id)

    def _leave_slot(self, load_id: int) -> None:
        if load_id in self._slots:
            self._slots[self._slots.index(load_id)] = None
            for run in self.running:
                if run.load_id == load_id:
                    self._violated(f"load {load_id} left its slot under a running request")

    def _fails(self, verb: str, op: PageOp) -> bool:
        if not self._failures[verb, op.name]:
            return False
        self._failures[verb, op.name] -= 1
        return True

    # --- answers ---------------------------------------------------------------------------------

    def _run_of(self, call: Call, request: Any) -> _Run:
        load_id = self._load_of(call.model)
        shown = BASE_NAME if load_id is None else Path(self._loads[load_id].path).name
        if call.kind == "responses":
            limit = request.max_output_tokens
        elif call.kind in POOLED:
            limit = 1
        else:
            limit = getattr(request, "max_completion_tokens", None) or request.max_tokens
        with request_errors():
            prompts = [self._checked(text) for text in _prompts(call.kind, request)]
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
        run = _Run(call, load_id, shown, prompts, n, limit, natural_end, request)
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

    def _checked(self, prompt: str | list[int]) -> int:
        """Its tokens: as many as there are ids, or one per word and one more."""
        from vllm.exceptions import VLLMValidationError

        if isinstance(prompt, list) and not all(0 <= token < VOCABULARY for token in prompt):
            raise VLLMValidationError("Token id is out of vocabulary", parameter="prompt")
        tokens = _length(prompt)
        if tokens >= self.max_model_len:
            raise VLLMValidationError(
                f"The prompt has {tokens} tokens; the maximum context length is {self.max_model_len}.",
                parameter="prompt",
            )
        return tokens

    async def _produce(self, run: _Run, said: int = 0) -> AsyncIterator[int]:
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
                run.call.meter.finished([_finish(run, run.limit - 1)])
        finally:
            run.settle()
            for runs in (self.running, self.paused):
                if run in runs:
                    runs.remove(run)

    async def _sse(
        self, run: _Run, events: Callable[[_Run, int], list[dict[str, Any]]], include_usage: bool
    ) -> AsyncIterator[str]:
        last, relay = -1, run.call.relay
        said = 0 if relay is None else len(relay.said)
        if relay is not None:
            movable = run.call.resumable and run.sequences == 1
            relay.begins(movable)
            if said and not movable:
                run.call.failure = Unavailable("it cannot go on", code="replica_lost")
                yield _error_event("it cannot go on", 503)
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
                    yield _error_event("it broke", self.break_streams[0])
                    yield "data: [DONE]\n\n"
                    return
                last = i
                for event in events(run, i):
                    yield f"data: {json.dumps(event)}\n\n"
        except EngineDied:
            yield _error_event("the engine is dead", 500)
        except Unavailable as exc:
            yield _error_event(exc.message, 503)
        except TooManyRequests:
            yield _error_event("Internal server error", 500)
        if run.aborted:
            for event in events(run, last + 1):
                event["choices"][0]["finish_reason"] = "abort"
                yield f"data: {json.dumps(event)}\n\n"
        if include_usage:
            yield f"data: {json.dumps({**_head(run, stream=True), 'choices': [], 'usage': _usage(run)})}\n\n"
        yield "data: [DONE]\n\n"

    def _due_to_break(self, run: _Run) -> bool:
        assert self.break_streams is not None
        return min(run.produced.values()) > self.break_streams[1]

    def _chat_events(self, run: _Run, i: int) -> list[dict[str, Any]]:
        events = []
        if i == 0:
            for choice in range(run.sequences):
                events.append(_chunk(run, choice, {"delta": {"role": "assistant", "content": ""}}, None))
        for choice in range(run.sequences):
            delta = {"delta": {"content": "" if run.aborted else run.token(i)}}
            events.append(_chunk(run, choice, delta, _finish(run, i)))
        return events

    def _completion_events(self, run: _Run, i: int) -> list[dict[str, Any]]:
        text = "" if run.aborted else run.token(i)
        return [_chunk(run, choice, {"text": text}, _finish(run, i)) for choice in range(run.sequences)]

    def _body(self, run: _Run) -> dict[str, Any]:
        tokens = min(run.produced.values()) // run.choices
        text = run.text(tokens)
        finish = "abort" if run.aborted else _finish(run, tokens - 1)
        choices: list[dict[str, Any]] = []
        for i in range(run.sequences):
            if run.call.kind != "completion":
                said = {"message": {"role": "assistant", "content": text}, "logprobs": None}
            else:
                prompt = _prompts("completion", run.request)[i // run.choices]
                echoed = _text(prompt) if run.request.echo else ""
                said = {"text": echoed + text, "logprobs": self._log_probs(run, prompt, tokens)}
            choices.append({"index": i, **said, "finish_reason": finish})
        return {**_head(run, stream=False), "choices": choices, "usage": _usage(run)}

    async def _embed(self, run: _Run) -> dict[str, Any]:
        async for _ in self._produce(run):
            pass
        if run.aborted:
            raise Unavailable("it was cut off", code="shutting_down", retry_after=5)
        push = 0.0 if run.load_id is None else push_of(Path(self._loads[run.load_id].path))
        vectors = [
            log_probs(_text(prompt), _length(prompt), push, run.shown)
            for prompt in _prompts("embedding", run.request)
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

    def _log_probs(self, run: _Run, prompt: str | list[int], tokens: int) -> dict[str, Any] | None:
        """OpenAI's lists; with tokens as ids, which is how the probe asks."""
        top = run.request.logprobs
        if top is None:
            return None
        push = 0.0 if run.load_id is None else push_of(Path(self._loads[run.load_id].path))
        length = _length(prompt)
        ids = prompt if isinstance(prompt, list) else [i % VOCABULARY for i in range(length)]
        steps: list[dict[str, float] | None] = []
        names = []
        for at in range(0 if run.request.echo else length, length + tokens):
            known = log_probs(_text(prompt), at, push, run.shown)
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

    def _violated(self, what: str) -> None:
        self.violations.append(what)


def _length(prompt: str | list[int]) -> int:
    return len(prompt) if isinstance(prompt, list) else len(prompt.split()) + 1


def _text(prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else " ".join(map(str, prompt))


def _prompts(kind: str, request: Any) -> list[str | list[int]]:
    if kind == "responses":
        items = [request.input] if isinstance(request.input, str) else request.input
        return [" ".join(item if isinstance(item, str) else str(dict(item).get("content")) for item in items)]
    if kind not in ("completion", *POOLED):
        return [" ".join(str(message.get("content")) for message in request.messages)]
    given = pooled_prompts(request) if kind in POOLED else request.prompt
    prompts = given if isinstance(given, list) else [given]
    if not prompts:
        raise ValueError("there is no prompt")
    if isinstance(prompts[0], int):
        prompts = [prompts]
    return list(prompts)


def _head(run: _Run, *, stream: bool) -> dict[str, Any]:
    if run.call.kind != "completion":
        id_, object_ = f"chatcmpl-{run.call.id}", "chat.completion.chunk" if stream else "chat.completion"
    else:
        id_, object_ = f"cmpl-{run.call.id}", "text_completion"
    return {"id": id_, "object": object_, "created": 0, "model": run.call.public_model}


def _chunk(run: _Run, index: int, said: dict[str, Any], finish: str | None) -> dict[str, Any]:
    choice = {"index": index, **said, "logprobs": None, "finish_reason": finish}
    return {**_head(run, stream=True), "choices": [choice]}


def _finish(run: _Run, i: int) -> str | None:
    if i != run.limit - 1:
        return None
    return "stop" if run.natural_end else "length"


def _usage(run: _Run) -> dict[str, int]:
    prompt, output = sum(run.prompts), sum(run.produced.values())
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def _error_event(message: str, code: int) -> str:
    error = {"message": message, "type": "BadRequestError", "param": None, "code": code}
    return f"data: {json.dumps({'error': error})}\n\n"

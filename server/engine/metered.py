"""AsyncLLM that runs nothing without a call, counts what a call produces, and pauses and resumes calls.

Imported by ``Engine.start`` alone: importing vLLM takes seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GenerationError, GracefulHTTPError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError

from adapters.worker.scheduler import scheduler_of
from server.engine import guard, replay
from server.engine.calls import Admission, Call, EngineDied, Meter, Relay, current_call
from server.errors import BadRequest, ServerError, Unavailable
from server.logs import REQUEST

# Seconds that the front end may take to render a prompt, before a call that is to be paused is let run on.
RENDER_TIMEOUT_S = 30.0
CORE = "EngineCore"  # how vLLM calls the processes of a core (CoreEngineProcManager)


class MeteredLLM(AsyncLLM):  # type: ignore[misc]  # vLLM is not typed for us
    """AsyncLLM that runs nothing without a call, and tells the call's meter what it produces.

    A paused call is unknown to vLLM's core, but not to its output processor: detokenizer, stop strings,
    log-probabilities and usage are kept there and go on as if nothing had happened.
    """

    _calls: weakref.WeakValueDictionary[str, Call]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._calls = weakref.WeakValueDictionary()  # by the id that ``generate`` was called with
        self._ending: set[asyncio.Task[None]] = set()
        self._blocks = kwargs["vllm_config"].cache_config.num_gpu_blocks  # before the core has counted them
        self._executor_class = kwargs["executor_class"]
        self.life = 1  # counts the cores that this object has had
        self._detached = False
        # Tries out what an answer must look like before the engine gets it; see server.engine.structure.
        self.check_structure: Callable[[Call, Any], Awaitable[None]] = refuse_structure
        self._starting: asyncio.Future[Any] | None = None
        self.on_lost: Callable[[EngineDied], None] = lambda exc: self.detach(str(exc))
        config = kwargs["vllm_config"].scheduler_config
        config.scheduler_cls = scheduler_of(config) or config.scheduler_cls
        self._others = _cores()
        super().__init__(*args, **kwargs)
        # vLLM would compile it on the event loop, and choose a backend for everybody by the first request.
        self.input_processor.structured_outputs_config = None
        # vLLM's output handler would end every request here, also those that can go on.
        self.output_processor.propagate_error = self._core_failed
        self._note_processes()
        statistics = self.logger_manager  # None where ENGINE_ARGS turn them off
        for one in statistics.stat_loggers if statistics else ():
            if hasattr(one, "gauge_lora_info"):
                # It keeps a series for every set of adapters that ever ran or waited together.
                one.gauge_lora_info = None

    def watch_for_nan(self, found: Callable[[Call], None]) -> None:
        """From now on ends calls whose logits have NaN, or whose embedding, label or score is none, after
        telling ``found`` of each.

        vLLM counts the logits' by request and does nothing with the count.
        """
        process = self.output_processor.process_outputs

        def look_and_process(outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
            sound = [output for output in outputs if _is_finite(output)]
            if len(sound) < len(outputs):
                for output in outputs:
                    if not _is_finite(output):
                        self._end_for_nan(output.request_id, found)
            return process(sound, *args, **kwargs)

        self.output_processor.process_outputs = look_and_process

    def _end_for_nan(self, request_id: str, found: Callable[[Call], None]) -> None:
        state = self.output_processor.request_states.get(request_id)
        call = self._calls.get(state.external_req_id) if state is not None else None
        if state is None or call is None:
            return
        found(call)
        for sent, part in self._unfinished(call):
            queue, part.queue = part.queue, None  # else the abort would replace the error
            self.settle(part.external_req_id, call.meter)
            if queue is not None:
                queue.put(GracefulHTTPError(str(call.failure), HTTPStatus.INTERNAL_SERVER_ERROR))
            self.output_processor.abort_requests([sent.request_id], True)
        ids = [sent.request_id for sent in call.sent]
        ending = asyncio.get_running_loop().create_task(self.engine_core.abort_requests_async(ids))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    def __del__(self) -> None:
        """``Engine`` stops it; vLLM's own attempt at interpreter exit finds its modules gone."""

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> AsyncIterator[Any]:
        call = call_of_request(request_id)
        self._calls[request_id] = call
        if self.observability_config.otlp_traces_endpoint is not None and (ids := REQUEST.get()):
            kwargs["trace_headers"] = {"traceparent": ids.traceparent}
        if getattr(sampling_params, "thinking_token_budget", None) is not None and not self._thinks:
            sampling_params.thinking_token_budget = None  # vLLM would refuse a budget for no thoughts
        stream = super().generate(prompt, sampling_params, request_id, **kwargs)
        if getattr(sampling_params, "n", 1) > 1 and sampling_params.prompt_logprobs is not None:
            stream = with_prompt_logprobs(stream)
        if getattr(sampling_params, "structured_outputs", None) is not None:
            stream = self._checked(call, sampling_params.structured_outputs, stream)
        return self._counted(call, request_id, prompt, stream, sampling_params)

    @property
    def _thinks(self) -> bool:
        """Whether the base's thoughts are told from its answers."""
        config = self.vllm_config.reasoning_config
        return config is not None and config.enabled

    def encode(self, prompt: Any, pooling_params: Any, request_id: str, **kwargs: Any) -> AsyncIterator[Any]:
        call = call_of_request(request_id)
        self._calls[request_id] = call
        stream = super().encode(prompt, pooling_params, request_id, **kwargs)
        return self._counted(call, request_id, prompt, stream)

    def _counted(
        self, call: Call, part: str, prompt: Any, stream: AsyncIterator[Any], sampling_params: Any = None
    ) -> AsyncIterator[Any]:
        """``stream``, metered, and where tokens are limited admitted by what it may come to."""
        if call.relay is None or sampling_params is None:
            metered = self._metered(stream, call.meter, part)
        else:
            metered = self._relayed(stream, call, call.relay, part)
        if call.admission is None:
            return metered
        given = sampling_params
        sequences, each = (given.n, given.max_tokens or 0) if given is not None else (0, 0)
        call.admission.asks(tokens_of(prompt), sequences * each, sequences)
        return admitted_stream(call.admission, metered, sampling_params)

    async def _checked(self, call: Call, params: Any, stream: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """``stream``, once what it must look like has been tried out; mostly it was before the lease."""
        try:
            await self.check_structure(call, params)
        except ServerError as exc:
            call.failure = exc
            raise GenerationError(exc.message) from exc
        async for output in stream:
            yield output

    @staticmethod
    async def _metered(stream: AsyncIterator[Any], meter: Meter, part: str) -> AsyncIterator[Any]:
        # While streaming an output holds what is new; otherwise one output holds everything.
        produced, output = 0, None
        async for output in stream:
            if isinstance(output.outputs, list):  # an embedding's is no list
                for completion in output.outputs:
                    produced += len(completion.token_ids)
            prompt = len(output.prompt_token_ids or ())
            meter.progressed(part, prompt, produced, output.num_cached_tokens or 0)
            yield output
        meter.finished(reasons_of(output))

    async def _relayed(
        self, stream: AsyncIterator[Any], call: Call, relay: Relay, part: str
    ) -> AsyncIterator[Any]:
        """``stream``, metered and told to ``relay``; goes on in the core once what it has said is taken."""
        produced, output = 0, None
        async for output in stream:
            ids = [token for completion in output.outputs for token in completion.token_ids]
            produced += len(ids)
            prompt, cached = len(output.prompt_token_ids or ()), output.num_cached_tokens or 0
            call.meter.progressed(part, prompt, produced, cached)
            relay.produced(ids, prompt, cached)
            yield output
            if not output.finished:
                await relay.flush()
            if call.replaying:
                call.replaying = False
                ((sent, _),) = self._unfinished(call) or [(None, None)]
                await self.resume(call, sent.lora_request if sent is not None else None)
        call.meter.finished(reasons_of(output))

    async def _add_request(self, request: Any, prompt: Any, parent: Any, index: int, queue: Any) -> None:
        call = self._calls.get(request.external_req_id)
        if call is not None and call.life != self.life:
            raise EngineDeadError  # its slot was in the core before this one
        if call is not None:
            call.sent.append(request)
            if call.relay is not None:
                call.relay.begins(call.resumable and len(call.sent) == 1 and replay.possible(request))
                if call.relay.said:
                    self._replay(call, call.relay, request, prompt, queue)
                    return
        if call is None or not call.paused:
            await super()._add_request(request, prompt, parent, index, queue)
        else:
            self.output_processor.add_request(request, prompt, parent, index, queue)

    def _replay(self, call: Call, relay: Relay, request: Any, prompt: Any, queue: Any) -> None:
        """Begins with tokens that another engine has produced, as one output; see ``_relayed``."""
        if not (call.resumable and len(call.sent) == 1 and replay.possible(request)):
            call.failure = Unavailable("The answer cannot go on at another replica.", code="replica_lost")
            raise GracefulHTTPError(str(call.failure), HTTPStatus.SERVICE_UNAVAILABLE)
        call.paused = call.replaying = True
        self.output_processor.add_request(request, prompt, None, 0, queue)
        state = self.output_processor.request_states[request.request_id]
        self.output_processor.process_outputs([replay.output_of(request, relay.said, relay.cached)])
        if state.stats is not None:  # or vLLM's statistics take the first step here for a very long one
            state.stats.first_token_ts = state.stats.last_token_ts = time.monotonic()

    def _unfinished(self, call: Call) -> list[tuple[Any, Any]]:
        """(what was sent, what its output processor holds) for each part that goes on."""
        states = self.output_processor.request_states
        return [(sent, states[sent.request_id]) for sent in call.sent if sent.request_id in states]

    async def pause(self, call: Call) -> bool:
        if not call.resumable:
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RENDER_TIMEOUT_S):
                # Until then the front end may still look for its model, whose slot is to be emptied.
                while not call.sent and not call.aborted:
                    await asyncio.sleep(0.005)
        unfinished = self._unfinished(call)
        if not unfinished or not all(replay.can_resume(sent) for sent, _ in unfinished):
            return False
        call.paused, call.replaying = True, False
        left = [sent.request_id for sent, _ in unfinished]
        for sent, state in unfinished:
            self._rename(sent, state)
        await self.engine_core.abort_requests_async(left)
        return True

    def _rename(self, sent: Any, state: Any) -> None:
        """Gives it an id that the core has never seen: what is under way for the old one is dropped.

        The same tokens come again when it is resumed. (The core also handles an abort twice, which would
        end a request that came back under its old id.)
        """
        processor, old = self.output_processor, sent.request_id
        processor.lora_states.request_finished(old, state.lora_name)
        stem, _, count = old.partition("~")
        new = f"{stem}~{int(count or 0) + 1}"
        processor.request_states[new] = processor.request_states.pop(old)
        siblings = processor.external_req_ids[state.external_req_id]
        siblings[siblings.index(old)] = new
        sent.request_id = state.request_id = state.queue.request_id = new

    async def resume(self, call: Call, lora_request: Any) -> None:
        call.paused = False
        call.life = self.life
        for sent, state in self._unfinished(call):
            await self.engine_core.add_request_async(replay.continuation(sent, state, lora_request))

    # --- another core ----------------------------------------------------------------------------

    def _core_failed(self, exc: Exception) -> None:
        self.on_lost(EngineDied(str(exc) or type(exc).__name__))

    def detach(self, reason: str) -> None:
        """Lets go of the core: pauses each call that can go on from its tokens, and ends every other one."""
        if not self._detached:
            self._detached = True
            self.life += 1
            handler: Any = self.output_handler
            if handler is not None and handler is not asyncio.current_task():
                handler.cancel()
        states = self.output_processor.request_states
        kept: set[str] = set()
        for call in set(self._calls.values()):
            unfinished = self._unfinished(call)
            if not call.paused and unfinished and call.resumable:
                call.paused = all(replay.can_resume(sent) for sent, _ in unfinished)
                for sent, state in unfinished if call.paused else ():
                    self._rename(sent, state)
            call.replaying = False
            if call.paused:
                kept.update(sent.request_id for sent, _ in unfinished)
        for id_ in [id_ for id_ in states if id_ not in kept]:
            state = states[id_]
            call_of = self._calls.get(str(state.external_req_id))
            if call_of is not None:
                self.settle(state.external_req_id, call_of.meter)
            queue, state.queue = state.queue, None  # else the abort would replace the error
            self.output_processor.abort_requests([id_], internal=True)
            if queue is not None:
                queue.put(EngineDeadError(reason))

    def _note_processes(self) -> None:
        """Remembers the core and what it has started: its children lose their parent when it dies."""
        self._core = _cores() - self._others
        self._processes = _processes_of(self._core)

    def kill(self) -> None:
        """Ends the core and all that it has started, in whatever state they are."""
        guard.kill({**self._processes, **_processes_of(self._core)})
        self.engine_core.shutdown(timeout=0.0)

    async def kill_starting(self) -> None:
        """Ends a core that is still being started, which nothing else can interrupt."""
        while self._starting is not None and not self._starting.done():
            guard.kill(_processes_of(_cores() - self._others))
            await asyncio.wait({self._starting}, timeout=0.2)
        if self._starting is not None and self._starting.exception() is None:
            await asyncio.to_thread(self._starting.result().shutdown, 0.0)

    async def restart(self) -> None:
        """Another core, for the same front end: what waits in the output processor stays there.

        Cancelling does not stop the start; see ``kill_starting``.
        """
        config = self.vllm_config
        config.cache_config.num_gpu_blocks = self._blocks
        self._others = _cores()
        self._starting = asyncio.ensure_future(
            asyncio.to_thread(
                EngineCoreClient.make_async_mp_client,
                vllm_config=config,
                executor_class=self._executor_class,
                log_stats=self.log_stats,
                renderer=self.renderer,
            )
        )
        self.engine_core = await asyncio.shield(self._starting)
        self._starting = None
        self._note_processes()
        self.output_handler = None
        self._detached = False
        self._run_output_handler()

    async def give_up(self, call: Call, reason: str) -> None:
        for sent, state in self._unfinished(call):
            queue, state.queue = state.queue, None  # else the abort would replace the error
            queue.put(GracefulHTTPError(reason, HTTPStatus.SERVICE_UNAVAILABLE))
            await self.abort(sent.request_id, internal=True)

    async def abort(self, request_id: Any, internal: bool = False) -> None:
        """Counts first: vLLM itself aborts what is cancelled, and then forgets how much there was."""
        states = self.output_processor.request_states
        for one in [request_id] if isinstance(request_id, str) else list(request_id):
            external = str(getattr(states.get(one), "external_req_id", "")) if internal else one
            call = self._calls.get(external)
            if call is not None:
                self.settle(external, call.meter)
        await super().abort(request_id, internal)

    def settle(self, request_id: str, meter: Meter) -> None:
        """Counts what is produced but not handed out yet; needed before an abort forgets it."""
        processor = self.output_processor
        prompt = produced = 0
        for internal in processor.external_req_ids.get(request_id, ()):
            state = processor.request_states.get(internal)
            if state is not None and state.detokenizer is not None:
                prompt = state.prompt_len
                produced += state.detokenizer.num_output_tokens()
        if produced:
            meter.progressed(request_id, prompt, produced, 0)


def _is_finite(output: Any) -> bool:
    """Whether what the core tells of a request has no NaN in its logits or in what it pooled."""
    pooled = output.pooling_output
    return not output.num_nans_in_logits and (pooled is None or bool(pooled.isfinite().all()))


async def refuse_structure(call: Call, params: Any) -> None:
    raise BadRequest("Schemas, patterns and grammars cannot be used with this model's tokenizer.")


def _cores() -> set[int]:
    """The pids of this process's cores: of every engine that it has, also of one that is just starting."""
    children = multiprocessing.active_children()
    return {one.pid for one in children if one.pid is not None and one.name.startswith(CORE)}


def _processes_of(cores: Iterable[int]) -> dict[int, str]:
    """pid -> when it began, of these cores and all below."""
    found: dict[int, str] = {}
    for pid in cores:
        found |= {pid: guard.started_at(pid), **guard.descendants(pid)}
    return found


async def with_prompt_logprobs(stream: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """``stream``, of several answers to one prompt, with the prompt's log-probabilities in each output.

    vLLM has them in the first of each answer, and loses those of an answer that begins after another one
    where the two outputs are put together, as happens when the prompt is read at different steps for them.
    """
    found = None
    async for output in stream:
        found = output.prompt_logprobs or found
        output.prompt_logprobs = found
        yield output


def call_of_request(request_id: str) -> Call:
    """The call that vLLM's front end now begins a part of."""
    call = current_call.get()
    if call is None:
        raise RuntimeError("the engine was asked to run something outside an admitted call")
    call.request_ids.append(request_id)
    return call


def reasons_of(output: Any) -> list[str | None]:
    """Why each answer of a part ended, by its last output; none for an embedding."""
    answers = output.outputs if output is not None else ()
    return [answer.finish_reason for answer in answers] if isinstance(answers, list) else []


def tokens_of(prompt: Any) -> int:
    """Of a prompt that vLLM's front end has rendered."""
    ids = prompt.get("prompt_token_ids")
    return len(prompt["prompt_embeds"] if ids is None else ids)


async def admitted_stream(
    admission: Admission, stream: AsyncIterator[Any], sampling_params: Any = None
) -> AsyncIterator[Any]:
    """``stream``, which runs only when it is first asked for something, once it may.

    vLLM makes the streams of all prompts of a request before it asks any.
    """
    try:
        most = await admission.settle()
    except ServerError as exc:  # vLLM would log any other with a traceback
        raise GenerationError(exc.message) from exc
    if most is not None:
        sampling_params.max_tokens = min(sampling_params.max_tokens, most)
        # vLLM looks at it first, and would go on beyond ``max_tokens``.
        sampling_params.min_tokens = min(sampling_params.min_tokens, most)
    async for output in stream:
        yield output

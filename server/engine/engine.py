"""The engine: a base model that vLLM runs, with adapters paged in and out of its slots.

    Engine.start(settings)        loads the base model; adapters are paged through ``adapters.worker``
    engine.page(ops)              carries out paging operations between two engine steps
    engine.parse(kind, body)      vLLM's own request model
    engine.answer(call, request)  vLLM's own OpenAI handlers, for a call that holds a lease

``metered`` counts the tokens of every call below the OpenAI handlers, so that it counts what a client left
behind too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.datastructures import State

from adapters.awake import AwakeTimeout
from adapters.model import BaseModel
from server.engine import contract, environment, guard, scoring, serving, structure
from server.engine.calls import (
    Answer,
    Call,
    Dialect,
    EngineDied,
    Kind,
    PageOp,
    PageReport,
    Unmetered,
    WorkerReport,
    current_call,
)
from server.engine.errors import engine_errors, filled, named, request_errors
from server.engine.grammars import Grammars
from server.engine.manners import Manner, current_manner
from server.engine.notices import Notices
from server.engine.own_tokens import read_own_tokens
from server.engine.paging import Paging, worker_options
from server.engine.parsers import Parsers
from server.engine.sizing import EngineCapacity
from server.engine.validation import parsed, parsed_in_turns, resumable
from server.errors import Internal, ServerError, Unavailable
from server.settings import Settings

logger = logging.getLogger(__name__)

# Seconds between two attempts to empty the prefix cache, which vLLM refuses while anything runs.
PREFIX_RESET_RETRY_S = 1.0
OPEN_TIMEOUT_S = 300.0  # with all that is compiled at the first tokens, beside others' work
ABORT_TIMEOUT_S = 5.0  # a hung engine must not keep whoever leaves it
ANSWER_TIMEOUT_S = 3.0  # for an engine that is asked whether it can still stop by itself
STOP_TIMEOUT_S = 15.0
CHECK_EVERY_S = 0.5


FIRST_CALL = "first-token"


def _log_fault(model: str, reason: str) -> None:
    logger.error("%s: %s", model, reason)


class Engine:
    """A running vLLM engine. Made by ``start``; ``stop`` ends its processes."""

    def __init__(
        self,
        llm: Any,
        state: State,
        paging: Paging,
        base: BaseModel,
        capacity: EngineCapacity,
        max_running: int,
        max_model_len: int,
        dialects: Mapping[Kind, Dialect],
    ) -> None:
        self.base = base
        self.capacity = capacity
        self.max_running = max_running
        self.max_model_len = max_model_len
        self._llm = llm
        self._state = state
        self._paging = paging
        self._dialects = dialects
        self.parsers = Parsers(None, None, tools_shown=False)
        self.exact_on: str | None = None  # the devices whose answers have the same bits in any batch
        self._notices: Notices | None = None
        # Told (model, reason) when a model's answer was not a number; see ``_not_finite``.
        self.on_fault: Callable[[str, str], None] = _log_fault
        self._forgetting: asyncio.Task[None] | None = None
        self._grammars: Grammars | None = None

    @classmethod
    async def start(cls, settings: Settings, dialects: Mapping[Kind, Dialect]) -> Engine:
        """Loads the base model; takes from half a minute (small, CPU) to many minutes (70B).

        ``dialects`` are the API surfaces that it will be asked in.

        Raises ValueError for engine arguments that vLLM does not know or cannot combine, for slots that are
        "auto" where their number cannot be told, and as ``environment.settle``; ContractBroken for a vLLM
        that this program cannot use.
        """
        environment.settle()
        from adapters.inspection.base_model import fingerprint, quantized_as

        await asyncio.to_thread(contract.check)
        # Importing vLLM and torch takes seconds and is not needed to read settings, to run the command line
        # or to be a gateway.
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state

        from server.engine import arguments, bases
        from server.engine.metered import MeteredLLM

        arguments.want_batch_invariance(settings)
        await asyncio.to_thread(bases.refuse_what_cannot_load, settings)
        settings, parsers, tokenizer = await asyncio.to_thread(arguments.choose_parsers, settings)
        slots = await asyncio.to_thread(arguments.slots_of, settings)
        args, engine_args = arguments.vllm_arguments(settings, slots)
        guard.start()
        notices = Notices.open() if settings.load_notices else None
        llm = await asyncio.to_thread(MeteredLLM.from_engine_args, engine_args)
        engine: Engine | None = None
        try:
            state = State()
            tasks = await llm.get_supported_tasks()
            pooling = "generate" not in tasks
            task = llm.vllm_config.model_config.get_pooling_task(tasks) if pooling else None
            if task not in (None, "embed", "classify"):
                raise ValueError(
                    f"{settings.model} neither generates text nor makes embeddings or labels;"
                    f" it supports {', '.join(tasks)}"
                )
            await init_app_state(llm, state, args, tasks)
            names = state.openai_serving_models.lora_requests
            paging = Paging(llm, names, worker_options(settings, notices))
            described = await paging.open(slots.active, slots.host)
            base = arguments.base_model_of(settings.served_model_name, described)
            found = await asyncio.to_thread(fingerprint, Path(settings.model))
            bits, published = await asyncio.to_thread(quantized_as, Path(settings.model))
            base = replace(base, source=settings.model, fingerprint=found, pooling=pooling)
            config = llm.vllm_config
            base = replace(base, quantized=bits, published_quantized=published)
            base = replace(base, head=arguments.head_of(base, config, task))
            base = replace(base, chat=arguments.chat_of(config, tokenizer))
            bases.refuse_what_cannot_run(config)
            arguments.log_advice(config, base)
            engine = cls(
                llm,
                state,
                paging,
                base,
                arguments.capacity_of(slots, base, described, config),
                max_running=config.scheduler_config.max_num_seqs,
                max_model_len=config.model_config.max_model_len,
                dialects=dialects,
            )
            engine.parsers = parsers
            engine.exact_on = arguments.exact_on(settings, config)
            engine._notices = notices
            llm.watch_for_nan(engine._not_finite)
            engine._adapt_serving(settings.served_model_name)
            if not pooling:
                await engine._start_grammars(settings.schema_timeout)
            await engine._first_token()
        except BaseException:
            if engine is not None and engine._grammars is not None:
                engine._grammars.stop()
            if notices is not None:
                notices.close()
            llm.shutdown()
            raise
        return engine

    def _adapt_serving(self, base_name: str) -> None:
        """Lets vLLM's serving objects show our names and ids, and keep errors as they are."""
        state = self._state
        state.openai_serving_models.model_name = serving.public_name(base_name)
        read_own_tokens(self._llm.renderer)
        if self.base.makes == "embeddings":
            serving.embeddings_as_data(state.serving_embedding)
        if self.base.makes == "labels":
            scoring.score_by_heads(state)
        if self.base.pooling:
            return
        serving.own_templates(state.online_renderer)
        messages = state.anthropic_serving_messages
        messages.create_chat_completion = serving.chat_for_messages(messages.create_chat_completion)
        messages.to_chat_completion_request = serving.going_on(messages.to_chat_completion_request)

    async def _start_grammars(self, seconds: float) -> None:
        """Starts what tries out schemas and grammars. Without it they are refused: for some tokenizers."""
        config = self._llm.vllm_config
        blanks = not config.structured_outputs_config.disable_any_whitespace
        try:
            tokenizer = await asyncio.to_thread(structure.tokenizer_of, self._llm)
        except Exception as exc:
            logger.warning("structured output is refused: xgrammar does not take this tokenizer: %s", exc)
            return
        self._grammars = Grammars(tokenizer, seconds=seconds, any_whitespace=blanks)
        self._grammars.start()
        try:
            await self._grammars.warm()
        except Unavailable as exc:  # it is tried again with the first schema
            logger.warning("%s", exc.message)
        self._llm.check_structure = self._check_params

    async def _check_params(self, call: Call, params: Any) -> None:
        config = self._llm.vllm_config.structured_outputs_config
        spec = structure.settle(params, any_whitespace=not config.disable_any_whitespace)
        if spec is not None and self._grammars is not None:
            await self._grammars.check(call.cache_salt, [spec])

    async def check_structure(self, owner: str, request: Any) -> None:
        """Tries out the schemas, patterns and grammars of ``request``, for a tenant with this cache salt.

        Before it has a lease: it may take seconds. Raises BadRequest, TooManyRequests, Unavailable.
        """
        with request_errors():
            specs = structure.specs_of(request)
        if specs and self._grammars is not None:
            await self._grammars.check(owner, specs, structure.param_of(request))

    async def _first_token(self) -> None:
        """Two tokens (or an embedding) of the base model. ValueError with the reason where there are none.

        Some models load and end the engine at their first forward pass; then nothing was ready. And what is
        compiled at the first prompt, the first token after it, the first one that is drawn or the first
        log-probability would stop every stream later, for so long that the engine may be taken for hung.
        """
        dialect = next(d for d in self._dialects.values() if d.first_request and d.base == self.base.makes)
        body = {**(dialect.first_request or {}), "model": self.base.name}
        call = Call(FIRST_CALL, dialect.name, self.base.name, self.base.name, FIRST_CALL, Unmetered())
        try:
            await self.answer(call, self.parse(dialect.name, body))
        except EngineDied as exc:
            raise ValueError(
                f"the engine loaded {self.base.source} and ended at its first token; the log above has the"
                " reason. A mixture of experts, or a data type without a kernel here, may need a GPU."
            ) from exc
        except ServerError as exc:
            raise ValueError(f"the engine cannot answer with {self.base.source}: {exc.message}") from exc

    def watch(self, on_lost: Callable[[EngineDied], None]) -> None:
        """Calls ``on_lost`` once the engine's process is found dead, before any request hears of it."""
        self._llm.on_lost = on_lost

    def listen(self, on_notice: Callable[[], None]) -> bool:
        """Calls ``on_notice`` when a worker has ended a load. False where they do not say so."""
        if self._notices is None or not self._paging.is_told:
            return False
        self._notices.listen(on_notice)
        return True

    def detach(self, reason: str) -> None:
        """The engine is given up, dead or hung: forgets every load, and lets go of every call.

        A call that can go on exactly (see ``pause``) is paused, and resumes in the next engine; every other
        one ends with EngineDied. Safe to call again.
        """
        self._paging.forget()
        self._llm.detach(reason)

    async def kill(self) -> None:
        """Ends the engine's processes with SIGKILL, also stopped ones."""
        await asyncio.to_thread(self._llm.kill)

    async def restart(self) -> None:
        """Starts the engine's processes again, with the same model and no adapter. Raises what vLLM does."""
        await self._llm.restart()
        async with AwakeTimeout(OPEN_TIMEOUT_S):
            await self._while_it_lives(self._open())

    async def _open(self) -> None:
        await self._paging.open(self.capacity.gpu_slots, self.capacity.host_slots)
        await self._first_token()

    async def _while_it_lives(self, work: Coroutine[Any, Any, None]) -> None:
        """``work``, or EngineDied: a core that has ended leaves calls unanswered."""
        working = asyncio.ensure_future(work)
        try:
            while not working.done():
                await asyncio.wait({working}, timeout=CHECK_EVERY_S)
                await self.check()
            await working
        finally:
            working.cancel()

    async def stop(self) -> None:
        """Ends its processes: by SIGKILL where the engine is lost, hung or just being started again."""
        if self._forgetting is not None:
            self._forgetting.cancel()
        if self._grammars is not None:
            self._grammars.stop()
        if self._notices is not None:
            self._notices.close()
        await self._llm.kill_starting()
        try:
            async with AwakeTimeout(ANSWER_TIMEOUT_S):
                await self.check()
                await self.report()
        except Exception:
            logger.warning("the engine does not answer: its processes are killed")
        else:
            await asyncio.to_thread(self._llm.shutdown, STOP_TIMEOUT_S)
        await self.kill()

    @property
    def lora_dtype(self) -> str:
        """The narrowest dtype in which adapters are multiplied: "float32", "float16" or "bfloat16"."""
        config = self._llm.vllm_config
        dtypes = config.lora_config.lora_dtype, config.model_config.dtype
        return str(min(dtypes, key=lambda dtype: dtype.itemsize)).removeprefix("torch.")

    @property
    def version(self) -> str:
        """What runs the model: an upgrade may change its answers a little."""
        import vllm

        return f"vllm {vllm.__version__}" + (" pooling" if self.base.pooling else "")

    @property
    def vocabulary(self) -> int:
        """How many tokens the base model knows."""
        return int(self._llm.vllm_config.model_config.get_vocab_size())

    @property
    def max_logprobs(self) -> int:
        """The most log-probabilities beside a token's own that a request may ask for."""
        most = int(self._llm.vllm_config.model_config.max_logprobs)
        return self.vocabulary if most < 0 else most

    async def check(self) -> None:
        """Raises EngineDied unless the engine process answers; for /ready."""
        with engine_errors():
            await self._llm.check_health()

    async def page(self, ops: Sequence[PageOp]) -> PageReport:
        """Carries out ``ops`` in order between two engine steps, and collects what has been staged.

        An operation that fails is reported in its result; EngineDied is the only exception.
        """
        with engine_errors():
            return await self._paging.page(ops)

    async def report(self) -> WorkerReport:
        """The workers' own account. With several workers: host and slots hold what all of them hold."""
        with engine_errors():
            return await self._paging.report()

    def parse(self, kind: Kind, body: dict[str, Any]) -> Any:
        """``body`` as vLLM's request model. Raises BadRequest naming the field that is wrong."""
        model = serving.resolve(self._dialects[kind].request_model(body))
        return parsed(model, body, self.vocabulary, _stops_of(self.base))

    async def parse_in_turns(self, kind: Kind, body: dict[str, Any]) -> Any:
        """As ``parse``, for a body of any size: others have their turns in between."""
        model = serving.resolve(self._dialects[kind].request_model(body))
        return await parsed_in_turns(model, body, self.vocabulary, _stops_of(self.base))

    def resumable(self, request: Any) -> bool:
        """Whether ``request`` may be paused, by what is cheap to see; ``pause`` has the last word."""
        return resumable(request)

    async def answer(self, call: Call, request: Any) -> Answer:
        """vLLM's answer to ``request``. The caller closes the stream, or calls ``abort`` if it gives up.

        Raises BadRequest (and its kin) for what vLLM refuses, EngineDied when the engine is gone.
        """
        dialect = self._dialects[call.kind]
        request.model = call.model
        request.cache_salt = call.cache_salt
        if (request_id := dialect.request_id(call)) is not None:
            request.request_id = request_id
        call.life = self._llm.life
        token, chats = current_call.set(call), current_manner.set(call.manner)
        try:
            with request_errors():
                result = await dialect.call(self._state, request)
            serving.raise_if_error(call, result)
        except ServerError as exc:
            if call.failure is not None:
                raise call.failure from None
            raise named(filled(exc, request, self.max_model_len), dialect.prompt_field) from exc.__cause__
        finally:
            current_call.reset(token)
            current_manner.reset(chats)
        if not hasattr(result, "__aiter__"):
            return Answer(body=dialect.document(call, result))
        if dialect.asks_while_streaming:
            result = serving.in_call_context(call, result)
        return Answer(stream=serving.raise_errors(call, dialect.prompt_field, dialect.events(call, result)))

    async def tokens(self, kind: Kind, request: Any, manner: Manner | None = None) -> dict[str, Any]:
        """What is asked about tokens, by the base model's tokenizer and a chat template: no slot is needed.

        Raises BadRequest for what vLLM refuses.
        """
        dialect = self._dialects[kind]
        request.model = self.base.name
        chats = current_manner.set(manner)
        try:
            with request_errors():
                result = await dialect.call(self._state, request)
            serving.raise_if_error(None, result)
        except ServerError as exc:
            raise named(exc, dialect.prompt_field) from None
        finally:
            current_manner.reset(chats)
        return serving.shallow(result)

    async def abort(self, call: Call) -> None:
        """Ends what ``call`` still runs in the engine. Safe to call again, and after the end."""
        call.aborted = True
        self.poll(call)
        with contextlib.suppress(Exception):
            async with AwakeTimeout(ABORT_TIMEOUT_S):
                await self._llm.abort(call.request_ids)

    async def pause(self, call: Call) -> bool:
        """Takes what ``call`` runs out of the engine until ``resume``; its consumer notices only a wait.

        When it returns, nothing of the call uses its adapter any more, so the slot may be emptied. False, and
        nothing happens, if the call could not go on exactly as it would have (see ``replay.can_resume``) or
        has nothing left to produce.
        """
        with engine_errors():
            return bool(await self._llm.pause(call))

    async def resume(self, call: Call) -> None:
        """Goes on after ``pause`` where it stopped. The call's model must be in a slot again."""
        names = self._state.openai_serving_models.lora_requests
        with engine_errors():
            await self._llm.resume(call, names.get(call.model))

    async def give_up(self, call: Call, reason: str) -> None:
        """Ends a paused call with an error that says ``reason``: status 503 if nothing was answered."""
        call.failure = Unavailable(reason)
        await self._llm.give_up(call, reason)

    def poll(self, call: Call) -> None:
        """Tells the call's meter what has been produced so far; for answers that are not streamed."""
        for request_id in call.request_ids:
            self._llm.settle(request_id, call.meter)

    def _not_finite(self, call: Call) -> None:
        """Ends ``call``, whose answer is not a number, and has the KV cache cleaned of what it wrote.

        The prefix cache is emptied as soon as nothing runs: the blocks of its prompt hold zeros now.
        """
        if call.failure is None:
            call.failure = Internal(
                "The model's answer to this input is not a number.",
                code="answer_not_finite" if call.model == self.base.name else "adapter_not_finite",
            )
            self.on_fault(call.model, "an answer of its was not a number")
        if self._forgetting is None or self._forgetting.done():
            self._forgetting = asyncio.create_task(self._forget_prefixes(), name="loraplex-forget")

    async def _forget_prefixes(self) -> None:
        """Blocks that were cleaned hold zeros, and those of a NaN hold it; neither may be found again."""
        with contextlib.suppress(EngineDied), engine_errors():
            while not await self._llm.reset_prefix_cache():
                await asyncio.sleep(PREFIX_RESET_RETRY_S)


def _stops_of(base: BaseModel) -> int:
    """How many tokens end the answers of ``base``."""
    return len(base.chat.stop_token_ids) if base.chat is not None else 0

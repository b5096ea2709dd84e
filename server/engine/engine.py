"""vLLM behind one class: the only file of this process that imports it.

    Engine.start(settings)        loads the base model; adapters are paged through ``adapters.worker``
    engine.page(ops)              carries out paging operations between two engine steps
    engine.parse(kind, body)      vLLM's own request model
    engine.answer(call, request)  vLLM's own OpenAI handlers, for a call that holds a lease

The tokens of every call are counted in ``_MeteredLLM.generate``, below the OpenAI handlers, so that what a
client left behind is counted too.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import logging
import os
import weakref
from argparse import Namespace
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import ValidationError
from starlette.datastructures import State

from adapters.inspection.base_model import fingerprint
from adapters.model import BaseModel, ModuleShape
from adapters.worker.cpu import onednn
from server.engine import serving, sizing
from server.engine.layers import lora_layers
from server.engine.serving import FAILED, Kind, TokenKind
from server.engine.sizing import Capacity, Layer
from server.errors import BadRequest, Internal, ServerError, Unavailable, status_of
from server.settings import HOST_PER_GPU_SLOT, Settings

logger = logging.getLogger(__name__)

# Seconds that the front end may take to render a prompt, before a call that is to be paused is let run on.
RENDERED = 30.0


@dataclass(frozen=True, slots=True)
class PageOp:
    """One step of paging. ``name`` and ``path`` (absolute) are needed by "stage" only."""

    verb: Literal["stage", "activate", "deactivate", "evict"]
    load_id: int
    name: str = ""
    path: str = ""


@dataclass(frozen=True, slots=True)
class PageResult:
    """How an operation ended: ``error`` is None when it was done; ``seconds`` is the worker's time."""

    error: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class StageResult:
    """A load that has left its staging thread; ``size_bytes`` of host memory if ``error`` is None."""

    load_id: int
    error: str | None
    seconds: float
    size_bytes: int


@dataclass(frozen=True, slots=True)
class PageReport:
    results: tuple[PageResult, ...]
    staged: tuple[StageResult, ...]


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What the workers hold: load ids in host memory, per slot, and being staged."""

    host: frozenset[int]
    slots: tuple[int | None, ...]
    staging: frozenset[int]
    in_step_loads: int


class EngineDied(Exception):
    """The engine process is gone; nothing can be served until the server is started again."""


class Meter(Protocol):
    """Told by the engine what a call consumed.

    A call with several prompts runs as several ``part``s; the totals of one part are cumulative.
    """

    def progressed(self, part: str, prompt_tokens: int, output_tokens: int, cached_tokens: int) -> None: ...


class Admission(Protocol):
    """Says whether a call may run, once its prompts are tokens; see ``server.limits.quotas.Ticket``."""

    refused: ServerError | None

    def asks(self, prompt_tokens: int, output_tokens: int, sequences: int) -> None: ...
    async def settle(self) -> int | None: ...


@dataclass(slots=True, weakref_slot=True, eq=False)
class Call:
    """One admitted request on its way through the engine.

    ``model`` is the engine's name for what answers, ``public_model`` the name shown in the answer.
    ``cache_salt`` separates tenants in the prefix cache (at most 128 characters, none of ``@ / \\``).
    ``resumable`` is what ``Engine.resumable`` says of its request. ``sent`` holds what the engine was asked
    for, as vLLM's core knows it; see ``Engine.pause``.
    """

    id: str
    kind: Kind
    model: str
    public_model: str
    cache_salt: str
    meter: Meter
    admission: Admission | None = None
    request_ids: list[str] = field(default_factory=list)
    resumable: bool = False
    sent: list[Any] = field(default_factory=list)
    paused: bool = False
    aborted: bool = False
    broken: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """Either ``body`` (a JSON document) or ``stream`` (SSE chunks, which must be closed)."""

    body: dict[str, Any] | None = None
    stream: AsyncIterator[str] | None = None


@dataclass(frozen=True, slots=True)
class InFlight:
    """A call and the engine that runs it."""

    engine: Engine
    call: Call

    async def abort(self) -> None:
        await self.engine.abort(self.call)

    async def pause(self) -> bool:
        return await self.engine.pause(self.call)

    async def resume(self) -> None:
        await self.engine.resume(self.call)

    async def give_up(self, reason: str) -> None:
        await self.engine.give_up(self.call, reason)

    def poll(self) -> None:
        self.engine.poll(self.call)


_current_call: contextvars.ContextVar[Call | None] = contextvars.ContextVar("loraplex_call", default=None)


class Engine:
    """A running vLLM engine. Made by ``start``; ``stop`` ends its processes."""

    def __init__(
        self,
        llm: Any,
        state: State,
        base: BaseModel,
        capacity: Capacity,
        max_running: int,
        max_model_len: int,
    ) -> None:
        self.base = base
        self.capacity = capacity
        self.max_running = max_running
        self.max_model_len = max_model_len
        self._llm = llm
        self._state = state
        self._loads: dict[int, PageOp] = {}
        self._half_staged: dict[int, list[StageResult]] = {}
        self._workers = 1

    @classmethod
    async def start(cls, settings: Settings) -> Engine:
        """Loads the base model; takes from half a minute (small, CPU) to many minutes (70B).

        Raises ValueError for engine arguments that vLLM does not know or cannot combine, and for slots that
        are "auto" where their number cannot be told.
        """
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # We stop the engine when nothing runs any more, so its workers have nothing to finish.
        os.environ.setdefault("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "1")
        # Threads of a step that wait for each other by spinning take the processor from this process and
        # from loads, and then have to wait for these: with two cores every load is felt in every stream.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.environ.setdefault(onednn.CAPACITY, str(onednn.KERNELS))
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state

        slots = await asyncio.to_thread(_slots, settings)
        args, engine_args = _arguments(settings, slots)
        llm = await asyncio.to_thread(_metered_llm_class().from_engine_args, engine_args)
        try:
            state = State()
            tasks = await llm.get_supported_tasks()
            pooling = "generate" not in tasks
            if pooling and llm.vllm_config.model_config.get_pooling_task(tasks) != "embed":
                raise ValueError(
                    f"{settings.model} neither generates text nor makes embeddings;"
                    f" it supports {', '.join(tasks)}"
                )
            await init_app_state(llm, state, args, tasks)
            described = await llm.collective_rpc("loraplex_open", args=(slots.gpu, slots.host))
            base = _base_model(settings.served_model_name, described)
            found = await asyncio.to_thread(fingerprint, Path(settings.model))
            base = replace(base, source=settings.model, fingerprint=found, pooling=pooling)
            config = llm.vllm_config
            _advise(config)
            engine = cls(
                llm,
                state,
                base,
                _capacity(slots, base, described, config.lora_config.lora_dtype.itemsize),
                max_running=config.scheduler_config.max_num_seqs,
                max_model_len=config.model_config.max_model_len,
            )
        except BaseException:
            llm.shutdown()
            raise
        engine._workers = len(described)
        state.openai_serving_models.model_name = _public_name(settings.served_model_name)
        if pooling:
            serving.embeddings_as_data(state.serving_embedding)
            return engine
        messages = state.anthropic_serving_messages
        messages.create_chat_completion = _under_messages(messages.create_chat_completion)
        return engine

    async def stop(self) -> None:
        await asyncio.to_thread(self._llm.shutdown, 15.0)

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
    def max_logprobs(self) -> int:
        """The most log-probabilities beside a token's own that a request may ask for."""
        config = self._llm.vllm_config.model_config
        return int(config.get_vocab_size() if config.max_logprobs < 0 else config.max_logprobs)

    async def check(self) -> None:
        """Raises EngineDied unless the engine process answers; for /ready."""
        with _engine_errors():
            await self._llm.check_health()

    async def page(self, ops: Sequence[PageOp]) -> PageReport:
        """Carries out ``ops`` in order between two engine steps, and collects what has been staged.

        An operation that fails is reported in its result; EngineDied is the only exception.
        """
        wire = [(op.verb, op.load_id, op.name, op.path) for op in ops]
        with _engine_errors():
            reports = await self._llm.collective_rpc("loraplex_page", args=(wire,))
        results = []
        for op, per_worker in zip(ops, zip(*(r["results"] for r in reports), strict=True), strict=True):
            errors = [error for error, _ in per_worker if error is not None]
            results.append(PageResult(errors[0] if errors else None, max(s for _, s in per_worker)))
            self._remember(op, failed=bool(errors))
        return PageReport(tuple(results), self._whole_stages(reports))

    async def report(self) -> WorkerReport:
        """The workers' own account. With several workers: host and slots hold what all of them hold."""
        with _engine_errors():
            reports = await self._llm.collective_rpc("loraplex_report")
        first = reports[0]
        return WorkerReport(
            host=frozenset.intersection(*(frozenset(r["host"]) for r in reports)),
            slots=tuple(
                load if all(load in r["slots"] for r in reports) else None for load in first["slots"]
            ),
            staging=frozenset().union(*(r["staging"] for r in reports)),
            in_step_loads=sum(r["in_step_loads"] for r in reports),
        )

    def parse(self, kind: Kind | TokenKind, body: dict[str, Any]) -> Any:
        """``body`` as vLLM's request model. Raises BadRequest naming the field that is wrong."""
        from vllm.exceptions import VLLMValidationError

        try:
            return serving.request_model(kind, body).model_validate(body)
        except ValidationError as exc:
            raise _invalid(exc) from exc
        except VLLMValidationError as exc:
            raise BadRequest(_message_of(exc), param=exc.parameter) from exc
        except (ValueError, TypeError, OverflowError) as exc:
            raise BadRequest(_message_of(exc)) from exc

    def resumable(self, request: Any) -> bool:
        """Whether ``request`` may be paused, by what is cheap to see; ``pause`` has the last word."""
        formatted = getattr(request, "response_format", None)
        formatted = formatted or getattr(getattr(request, "text", None), "format", None)
        chooses = getattr(request, "tools", None) and request.tool_choice != "none"
        return (
            (getattr(request, "n", None) or 1) == 1
            and (formatted is None or formatted.type == "text")
            and getattr(request, "output_config", None) is None
            and not chooses
            and not getattr(request, "presence_penalty", None)
            and not getattr(request, "frequency_penalty", None)
            and (getattr(request, "seed", None) is None or request.temperature == 0)
        )

    def count_prompt(self, text: str) -> int:
        """A quick estimate of a prompt's tokens, at least 1; the true number comes with the first token."""
        return max(1, len(text) // 4)

    async def answer(self, call: Call, request: Any) -> Answer:
        """vLLM's answer to ``request``. The caller closes the stream, or calls ``abort`` if it gives up.

        Raises BadRequest (and its kin) for what vLLM refuses, EngineDied when the engine is gone.
        """
        request.model = call.model
        request.cache_salt = call.cache_salt
        if call.kind != "messages":  # see ``_under_messages``
            request.request_id = f"resp_{call.id}" if call.kind == "responses" else call.id
        state = self._state
        token = _current_call.set(call)
        try:
            with _request_errors():
                match call.kind:
                    case "chat":
                        result = await state.openai_serving_chat.create_chat_completion(request)
                    case "completion":
                        result = await state.openai_serving_completion.create_completion(request)
                    case "responses":
                        result = await state.openai_serving_responses.create_responses(request)
                    case "messages":
                        result = await state.anthropic_serving_messages.create_messages(request)
                    case "embedding":
                        result = await state.serving_embedding(request)
        finally:
            _current_call.reset(token)
        _raise_if_error(result)
        if hasattr(result, "model_dump"):
            return Answer(body=serving.document(call, call.kind, result))
        if call.kind == "embedding":
            if call.aborted:  # vLLM's answer is then an empty vector
                raise Unavailable("The server is shutting down.", code="shutting_down", retry_after=5)
            return Answer(body=result)
        if call.kind == "responses":
            result = _told(serving.response_events(call, _within(call, result)))
        elif call.kind == "messages":
            result = _told(serving.message_events(call, result))
        return Answer(stream=result)

    async def tokens(self, kind: TokenKind, request: Any) -> dict[str, Any]:
        """What is asked about tokens, by the base model's tokenizer and chat template: no slot is needed.

        Raises BadRequest for what vLLM refuses.
        """
        if kind == "detokenize":
            most = int(self._llm.vllm_config.model_config.get_vocab_size()) - 1
            if max(request.tokens, default=0) > most:  # the tokenizer would leave it out silently
                raise BadRequest(f"tokens: the vocabulary ends with {most}", param="tokens")
        request.model = self.base.name
        serving = self._state.serving_tokenization
        with _request_errors():
            match kind:
                case "tokenize":
                    result = await serving.create_tokenize(request, None)
                case "detokenize":
                    result = await serving.create_detokenize(request, None)
                case "count_tokens":
                    result = await self._state.anthropic_serving_messages.count_tokens(request)
        _raise_if_error(result)
        answer: dict[str, Any] = result.model_dump(exclude_none=True)
        return answer

    async def abort(self, call: Call) -> None:
        """Ends what ``call`` still runs in the engine. Safe to call again, and after the end."""
        call.aborted = True
        self.poll(call)
        with contextlib.suppress(Exception):
            await self._llm.abort(call.request_ids)

    async def pause(self, call: Call) -> bool:
        """Takes what ``call`` runs out of the engine until ``resume``; its consumer notices only a wait.

        When it returns, nothing of the call uses its adapter any more, so the slot may be emptied. False, and
        nothing happens, if the call could not go on exactly as it would have (see ``_can_resume``) or has
        nothing left to produce.
        """
        with _engine_errors():
            return bool(await self._llm.pause(call))

    async def resume(self, call: Call) -> None:
        """Goes on after ``pause`` where it stopped. The call's model must be in a slot again."""
        names = self._state.openai_serving_models.lora_requests
        with _engine_errors():
            await self._llm.resume(call, names.get(call.model))

    async def give_up(self, call: Call, reason: str) -> None:
        """Ends a paused call with an error that says ``reason``: status 503 if nothing was answered."""
        await self._llm.give_up(call, reason)

    def poll(self, call: Call) -> None:
        """Tells the call's meter what has been produced so far; for answers that are not streamed."""
        for request_id in call.request_ids:
            self._llm.settle(request_id, call.meter)

    def _remember(self, op: PageOp, *, failed: bool) -> None:
        """Keeps vLLM's table of servable names equal to what is in a slot."""
        from vllm.lora.request import LoRARequest

        names = self._state.openai_serving_models.lora_requests
        if op.verb == "stage" and not failed:
            self._loads[op.load_id] = op
        elif op.verb == "activate" and not failed:
            load = self._loads[op.load_id]
            names[load.name] = LoRARequest(load.name, load.load_id, load.path)
        elif op.verb in ("deactivate", "evict"):
            load = self._loads.pop(op.load_id, op) if op.verb == "evict" else self._loads.get(op.load_id, op)
            served = names.get(load.name)
            if served is not None and served.lora_int_id == op.load_id:
                del names[load.name]

    def _whole_stages(self, reports: Sequence[dict[str, Any]]) -> tuple[StageResult, ...]:
        """A load is staged when every worker has it, and failed when one of them could not."""
        whole = []
        for report in reports:
            for load_id, error, seconds, size in report["staged"]:
                parts = self._half_staged.setdefault(load_id, [])
                parts.append(StageResult(load_id, error, seconds, size))
                if len(parts) == self._workers:
                    del self._half_staged[load_id]
                    errors = [part.error for part in parts if part.error is not None]
                    if errors:
                        self._loads.pop(load_id, None)
                    slowest = max(part.seconds for part in parts)
                    whole.append(StageResult(load_id, errors[0] if errors else None, slowest, size))
        return tuple(whole)


@dataclass(frozen=True, slots=True)
class _Slots:
    """Numbers for ``gpu_slots`` and ``host_slots``; what a GPU slot should take, if they were computed."""

    gpu: int
    host: int
    slot_bytes: int | None = None


def _slots(settings: Settings) -> _Slots:
    """``settings``' slots as numbers. Takes seconds where they are "auto": vLLM reads the model's config."""
    if isinstance(settings.gpu_slots, int) and isinstance(settings.host_slots, int):
        return _Slots(settings.gpu_slots, settings.host_slots)
    config = _arguments(settings, _Slots(1, 1))[1].create_engine_config()
    layers, lora = _layers(config), config.lora_config
    rank, itemsize = settings.max_lora_rank, lora.lora_dtype.itemsize
    workers = config.parallel_config.tensor_parallel_size
    slot = sizing.slot_bytes(
        layers, rank=rank, itemsize=itemsize, workers=workers, fully_sharded=lora.fully_sharded_loras
    )
    gpu, host = settings.gpu_slots, settings.host_slots
    if gpu == "auto":
        most = config.scheduler_config.max_num_seqs
        most = min(most, settings.max_running or most, most if host == "auto" else host or most)
        gpu = sizing.gpu_slots(settings.adapter_gpu_memory, slot, most)
    if host == "auto":
        entry = sizing.entry_bytes(layers, rank=rank, itemsize=itemsize, workers=workers)
        host = sizing.host_slots(settings.adapter_host_memory, entry, gpu)
    return _Slots(gpu, host or HOST_PER_GPU_SLOT * gpu, slot)


def _layers(config: Any) -> list[Layer]:
    """What a slot of the engine that ``config`` (VllmConfig) describes has room for."""
    from vllm.model_executor.model_loader.utils import get_model_cls

    model, lora = config.model_config, config.lora_config
    if model.is_multimodal_model or config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            "the slots of a multimodal model, or of one in pipeline stages, are not computed;"
            " give GPU_SLOTS and HOST_SLOTS as numbers"
        )
    implementation = get_model_cls(model)
    return lora_layers(
        model.hf_text_config,
        # An embedding model has lost its head.
        vocabulary=[
            name
            for name in implementation.embedding_modules
            if name != "lm_head" or model.runner_type != "pooling"
        ],
        fused=implementation.packed_modules_mapping,
        targets=lora.target_modules,
        workers=config.parallel_config.tensor_parallel_size,
        trust_remote_code=model.trust_remote_code,
    )


def _advise(config: Any) -> None:
    """What whoever operates the engine that ``config`` (VllmConfig) describes may not know."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and str(config.model_config.dtype) == "torch.bfloat16":
        from adapters.worker.cpu.features import multiplies_bfloat16

        if not multiplies_bfloat16():
            logger.warning(
                'this processor has no instructions for bfloat16: with ENGINE_ARGS=\'{"dtype": "float32"}\''
                " batches and prompts are multiplied two to three times as fast, and the base model takes"
                " twice the memory"
            )


def _capacity(slots: _Slots, base: BaseModel, described: Sequence[dict[str, Any]], itemsize: int) -> Capacity:
    """By what the workers have really allocated."""
    slot = max(int(one["slot_bytes"]) for one in described)
    if slots.slot_bytes not in (None, slot):
        logger.warning(
            "a slot was computed to take %d bytes and takes %d: give GPU_SLOTS and HOST_SLOTS as numbers",
            slots.slot_bytes,
            slot,
        )
    layers = [Layer(shape.in_features, shape.out_features) for shape in base.modules.values()]
    entry = sizing.entry_bytes(layers, rank=base.max_lora_rank, itemsize=itemsize, workers=len(described))
    return Capacity(slots.gpu, slots.host, slot, entry)


def _arguments(settings: Settings, slots: _Slots) -> tuple[Namespace, Any]:
    """(arguments of vLLM's OpenAI front end, AsyncEngineArgs) for ``settings`` with ``slots``."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    if settings.model.startswith(("/", ".")) and not Path(settings.model).is_dir():
        raise ValueError(f"MODEL: there is no folder {settings.model}")
    ours: dict[str, Any] = {
        "model": settings.model,
        "enable_lora": True,
        "max_loras": slots.gpu,
        "max_cpu_loras": slots.host,
        "max_lora_rank": settings.max_lora_rank,
        "max_model_len": settings.max_model_len,
        "worker_extension_cls": "adapters.worker.extension.LoraplexWorker",
    }
    known = {f.name for f in fields(AsyncEngineArgs)}
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    given: dict[str, Any] = {}
    if current_platform.is_cpu():
        given = {
            # What adapters.worker.cpu.kernels multiplies fastest.
            "lora_dtype": STR_DTYPE_TO_TORCH_DTYPE["float32"],
            "distributed_executor_backend": "adapters.worker.cpu.executor.PatientExecutor",
        }
    given |= settings.engine_args
    for name, value in given.items():
        if name not in known and not hasattr(args, name):
            close = get_close_matches(name, known | set(vars(args)), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"ENGINE_ARGS: vLLM has no argument {name!r}{hint}")
        default = getattr(args, name, None)
        if isinstance(value, dict) and is_dataclass(default):
            given[name] = value = _config(name, default, value)
        setattr(args, name, value)
    for name, value in ours.items():
        setattr(args, name, value)
    args.served_model_name = [settings.served_model_name]
    args.enable_log_requests = False
    engine_args = {name: value for name, value in {**given, **ours}.items() if name in known}
    return args, AsyncEngineArgs(
        **engine_args, served_model_name=[settings.served_model_name], enable_log_requests=False
    )


def _config(name: str, default: Any, changes: dict[str, Any]) -> Any:
    """One of vLLM's config classes with ``changes``; what vLLM complains of becomes a ValueError."""
    try:
        return replace(default, **changes)
    except (ValueError, TypeError) as exc:
        raise ValueError(f"ENGINE_ARGS: {name}: {exc}") from exc


def _base_model(name: str, described: Sequence[dict[str, Any]]) -> BaseModel:
    """The whole model out of its workers' accounts: pipeline stages each know their own layers."""
    modules: dict[str, ModuleShape] = {}
    for one in described:
        modules.update({module: ModuleShape(*shape) for module, shape in one["modules"].items()})
    return BaseModel(
        name=name,
        modules=dict(sorted(modules.items())),
        max_lora_rank=described[0]["max_lora_rank"],
        fused={suffix: tuple(parts) for suffix, parts in described[0]["fused"].items()},
    )


def _public_name(base_name: str) -> Any:
    """What ``model`` shows in answers: the customer's own name, never the engine's."""

    def model_name(lora_request: Any = None) -> str:
        call = _current_call.get()
        return call.public_model if call is not None else base_name

    return model_name


def _under_messages(create: Any) -> Any:
    """Chat under vLLM's Anthropic handler: with our id, and with its errors kept (see ``until_broken``)."""

    async def create_chat_completion(request: Any, raw_request: Any = None) -> Any:
        call = _current_call.get()
        if call is None:
            raise RuntimeError("the engine was asked for a message outside an admitted call")
        request.request_id = call.id
        result = await create(request, raw_request)
        if not hasattr(result, "model_dump"):
            return serving.until_broken(call, result)
        if not serving.calls_are_objects(result):
            raise Internal("The model called a tool with arguments that are no JSON object.")
        return result

    return create_chat_completion


async def _within(call: Call, stream: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """``stream``, which may ask the engine for more at any step."""
    end = object()
    while True:
        token = _current_call.set(call)
        try:
            item = await anext(stream, end)
        finally:
            _current_call.reset(token)
        if item is end:
            return
        yield item


async def _told(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """``chunks``; an exception becomes their last event, as vLLM does it for chat."""
    try:
        with _request_errors():
            try:
                async for chunk in chunks:
                    yield chunk
            except ValidationError as exc:  # of an event of vLLM's own
                raise Internal(FAILED) from exc
    except EngineDied:
        yield serving.broken(FAILED, 500)
    except ServerError as exc:
        yield serving.broken(exc.message, status_of(exc)[0], exc.param)


def _raise_if_error(result: Any) -> None:
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    if isinstance(result, ErrorResponse):
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError  # vLLM turns it into an error response
        raise from_vllm(result.error.message, int(result.error.code), result.error.param)


def _metered_llm_class() -> Any:
    """A function, because importing vLLM takes seconds and is not needed to read settings or run the CLI."""
    from vllm.v1.engine.async_llm import AsyncLLM

    class _MeteredLLM(AsyncLLM):  # type: ignore[misc]  # vLLM is not typed for us
        """AsyncLLM that runs nothing without a call, and tells the call's meter what it produces.

        A paused call is unknown to vLLM's core, but not to its output processor: detokenizer, stop strings,
        log-probabilities and usage are kept there and go on as if nothing had happened.
        """

        _calls: weakref.WeakValueDictionary[str, Call]

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._calls = weakref.WeakValueDictionary()  # by the id that ``generate`` was called with
            super().__init__(*args, **kwargs)
            statistics = self.logger_manager  # None where ENGINE_ARGS turn them off
            for one in statistics.stat_loggers if statistics else ():
                if hasattr(one, "gauge_lora_info"):
                    # It keeps a series for every set of adapters that ever ran or waited together.
                    one.gauge_lora_info = None

        def __del__(self) -> None:
            """``Engine`` stops it; vLLM's own attempt at interpreter exit finds its modules gone."""

        def generate(
            self, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
        ) -> AsyncIterator[Any]:
            call = _begun(request_id)
            self._calls[request_id] = call
            stream = super().generate(prompt, sampling_params, request_id, **kwargs)
            return self._counted(call, request_id, prompt, stream, sampling_params)

        def encode(
            self, prompt: Any, pooling_params: Any, request_id: str, **kwargs: Any
        ) -> AsyncIterator[Any]:
            call = _begun(request_id)
            stream = super().encode(prompt, pooling_params, request_id, **kwargs)
            return self._counted(call, request_id, prompt, stream)

        def _counted(
            self, call: Call, part: str, prompt: Any, stream: AsyncIterator[Any], sampling_params: Any = None
        ) -> AsyncIterator[Any]:
            """``stream``, metered, and where tokens are limited admitted by what it may come to."""
            metered = self._metered(stream, call.meter, part)
            if call.admission is None:
                return metered
            given = sampling_params
            sequences, each = (given.n, given.max_tokens or 0) if given is not None else (0, 0)
            call.admission.asks(_tokens_of(prompt), sequences * each, sequences)
            return _admitted(call.admission, metered, sampling_params)

        @staticmethod
        async def _metered(stream: AsyncIterator[Any], meter: Meter, part: str) -> AsyncIterator[Any]:
            # While streaming an output holds what is new; otherwise one output holds everything.
            produced = 0
            async for output in stream:
                if isinstance(output.outputs, list):  # an embedding's is no list
                    for completion in output.outputs:
                        produced += len(completion.token_ids)
                prompt = len(output.prompt_token_ids or ())
                meter.progressed(part, prompt, produced, output.num_cached_tokens or 0)
                yield output

        async def _add_request(self, request: Any, prompt: Any, parent: Any, index: int, queue: Any) -> None:
            call = self._calls.get(request.external_req_id)
            if call is not None:
                call.sent.append(request)
            if call is None or not call.paused:
                await super()._add_request(request, prompt, parent, index, queue)
            else:
                self.output_processor.add_request(request, prompt, parent, index, queue)

        def _unfinished(self, call: Call) -> list[tuple[Any, Any]]:
            """(what was sent, what its output processor holds) for each part that goes on."""
            states = self.output_processor.request_states
            return [(sent, states[sent.request_id]) for sent in call.sent if sent.request_id in states]

        async def pause(self, call: Call) -> bool:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENDERED):
                    # Until then the front end may still look for its model, whose slot is to be emptied.
                    while not call.sent and not call.aborted:
                        await asyncio.sleep(0.005)
            unfinished = self._unfinished(call)
            if not unfinished or not call.resumable or not all(_can_resume(sent) for sent, _ in unfinished):
                return False
            call.paused = True
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
            for sent, state in self._unfinished(call):
                await self.engine_core.add_request_async(_continuation(sent, state, lora_request))

        async def give_up(self, call: Call, reason: str) -> None:
            from vllm.exceptions import GracefulHTTPError

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

    return _MeteredLLM


def _begun(request_id: str) -> Call:
    """The call that vLLM's front end now begins a part of."""
    call = _current_call.get()
    if call is None:
        raise RuntimeError("the engine was asked to run something outside an admitted call")
    call.request_ids.append(request_id)
    return call


def _tokens_of(prompt: Any) -> int:
    """Of a prompt that vLLM's front end has rendered."""
    ids = prompt.get("prompt_token_ids")
    return len(prompt["prompt_embeds"] if ids is None else ids)


async def _admitted(
    admission: Admission, stream: AsyncIterator[Any], sampling_params: Any = None
) -> AsyncIterator[Any]:
    """``stream``, which runs only when it is first asked for something, once it may.

    vLLM makes the streams of all prompts of a request before it asks any.
    """
    from vllm.exceptions import GenerationError

    try:
        most = await admission.settle()
    except ServerError as exc:  # vLLM would log any other with a traceback
        raise GenerationError(exc.message) from exc
    if most is not None:
        sampling_params.max_tokens = min(sampling_params.max_tokens, most)
    async for output in stream:
        yield output


def _can_resume(sent: Any) -> bool:
    """Whether a request that is begun anew from its prompt and its answer so far goes on as it would have.

    Not so where the core keeps more than tokens: a grammar's state, a random generator's, or counts of the
    answer's own tokens, which would then be the prompt's.
    """
    params = sent.sampling_params
    return (
        params is not None
        and params.n == 1
        and params.structured_outputs is None
        and params.presence_penalty == params.frequency_penalty == 0
        and (params.seed is None or params.sampling_type == params.sampling_type.GREEDY)
        and getattr(params, "thinking_token_budget", None) is None
        and getattr(params, "repetition_detection", None) is None
        and not params.bad_words
        and not params.extra_args
        and sent.prompt_embeds is None
    )


def _continuation(sent: Any, state: Any, lora_request: Any) -> Any:
    """``sent`` with what was answered so far as part of its prompt."""
    said = list(state.detokenizer.output_token_ids)
    params = sent.sampling_params.clone()
    params.max_tokens -= len(said)
    params.min_tokens = max(0, params.min_tokens - len(said))
    if said:  # log-probabilities of the prompt came with the first token
        params.prompt_logprobs = None
        params.skip_reading_prefix_cache = False
    more = copy.copy(sent)
    more.prompt_token_ids = [*sent.prompt_token_ids, *said]
    more.sampling_params = params
    more.lora_request = lora_request
    return more


def from_vllm(message: str, status: int, param: str | None) -> ServerError:
    if status == 503:
        return Unavailable(message)
    if status >= 500:
        return Internal(FAILED)
    return BadRequest(message, param=param)


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    """For calls about the engine itself: its death is the only thing that can be wrong with them."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as exc:
        raise EngineDied(str(exc)) from exc


@contextlib.contextmanager
def _request_errors() -> Iterator[None]:
    """For calls with a client's input: vLLM's exceptions mapped to ours, once, at the boundary."""
    from vllm.exceptions import GenerationError, GracefulHTTPError, VLLMClientError, VLLMError

    try:
        with _engine_errors():
            yield
    except GenerationError as exc:
        if isinstance(exc.__cause__, ServerError):  # see ``_admitted``
            raise exc.__cause__ from None
        raise Internal(FAILED) from exc
    except (ServerError, EngineDied):
        raise
    except GracefulHTTPError as exc:
        raise Unavailable(str(exc)) from exc
    except VLLMClientError as exc:
        raise BadRequest(_message_of(exc), param=getattr(exc, "parameter", None)) from exc
    except VLLMError as exc:
        raise Internal(FAILED) from exc
    except ValidationError as exc:
        raise _invalid(exc) from exc
    except (ValueError, TypeError, OverflowError) as exc:
        raise BadRequest(_message_of(exc)) from exc


def _invalid(exc: ValidationError) -> BadRequest:
    first = exc.errors(include_url=False, include_input=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    return BadRequest(f"{param}: {first['msg']}" if param else first["msg"], param=param)


def _message_of(exc: Exception) -> str:
    """The message alone: vLLM's ``str()`` appends the rejected value, however long it is."""
    return str(exc.args[0]) if exc.args else str(exc)

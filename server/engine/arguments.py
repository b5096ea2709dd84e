"""Settings as vLLM's arguments, and what they come to: slots, capacity, advice.

Imported by ``Engine.start`` alone: importing vLLM takes seconds.
"""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.model_loader.utils import get_model_cls
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:  # from 0.33 on
    from vllm.entrypoints.common.cli_args import make_arg_parser

from adapters.inspection.base_chat import BaseTokenizer, described, read_base_chat
from adapters.inspection.base_config import labels_of, read_base_config
from adapters.model import BaseChat, BaseModel, Head, ModuleShape
from adapters.worker.cpu.executor import YieldingExecutor
from adapters.worker.cpu.features import multiplies_bfloat16
from adapters.worker.scheduler import ADAPTERS, DORA, serves_dora
from server.engine import sizing
from server.engine.layers import lora_layers
from server.engine.parsers import AUTO, UNSHOWN, Parsers, parsers_of
from server.engine.sharding import divides_in_full, layers_served
from server.engine.sizing import EngineCapacity, Layer
from server.settings import HOST_PER_GPU_SLOT, Settings
from server.settings.engine_args import ONE_ENGINE_ARGS
from server.settings.engine_args_served import SERVED_ENGINE_ARGS

logger = logging.getLogger(__name__)

# The most that an adapter's own head may have, where ENGINE_ARGS do not say: 1 MiB a slot at 4,096 features.
LABELS = 64
NO_HOST = "none.invalid"  # a name that no host may have (RFC 6761)


@dataclass(frozen=True, slots=True)
class Slots:
    """Numbers for ``gpu_slots`` and ``host_slots``; what a GPU slot should take, if they were computed.

    ``adapters`` is how many share the GPU slots; 0 where each has one of its own.
    """

    gpu: int
    host: int
    slot_bytes: int | None = None
    adapters: int = 0

    @property
    def active(self) -> int:
        """How many adapters may be in slots at the same time."""
        return self.adapters or self.gpu


def slots_of(settings: Settings) -> Slots:
    """As ``_slots_of``, with the number of adapters that share them. ValueError if that is a wrong one."""
    slots = _slots_of(settings)
    if not settings.rank_slots:
        return slots
    if slots.gpu > settings.rank_slots:
        raise ValueError(f"RANK_SLOTS ({settings.rank_slots}) must be at least GPU_SLOTS ({slots.gpu})")
    if settings.max_lora_rank & (settings.max_lora_rank - 1):
        raise ValueError(f"RANK_SLOTS: MAX_LORA_RANK ({settings.max_lora_rank}) must be a power of two")
    return replace(slots, host=max(slots.host, settings.rank_slots), adapters=settings.rank_slots)


def _slots_of(settings: Settings) -> Slots:
    """``settings``' slots as numbers. Takes seconds where they are "auto": vLLM reads the model's config."""
    if isinstance(settings.gpu_slots, int) and isinstance(settings.host_slots, int):
        return Slots(settings.gpu_slots, settings.host_slots)
    config = vllm_arguments(settings, Slots(1, 1))[1].create_engine_config()
    layers, lora = _slot_layers(config), config.lora_config
    rank, itemsize = settings.max_lora_rank, lora.lora_dtype.itemsize
    workers, fully = config.parallel_config.tensor_parallel_size, lora.fully_sharded_loras
    slot = sizing.slot_bytes(layers, rank=rank, itemsize=itemsize, workers=workers, fully_sharded=fully)
    if serves_dora(config):
        slot += sizing.dora_bytes(layers)
    labels = _head_labels(config)
    most_labels = lora.max_lora_cls_labels or labels if labels else 0
    slot += _head_bytes(config, max(most_labels, labels))  # vLLM pads an adapter's own to the base's
    gpu, host = settings.gpu_slots, settings.host_slots
    if gpu == "auto":
        most = config.scheduler_config.max_num_seqs
        most = min(most, settings.max_running or most, most if host == "auto" else host or most)
        gpu = sizing.gpu_slots(settings.adapter_gpu_memory, slot, most)
    if host == "auto":
        entry = sizing.entry_bytes(
            layers,
            rank=rank,
            itemsize=itemsize,
            workers=workers,
            fully_sharded=fully,
            shards=settings.host_shards,
        )
        host = sizing.host_slots(settings.adapter_host_memory, entry + _head_bytes(config, most_labels), gpu)
    return Slots(gpu, host or HOST_PER_GPU_SLOT * gpu, slot)


def _head_labels(config: Any) -> int:
    """How many labels the base of ``config`` (VllmConfig) has, where it classifies; else 0."""
    model = config.model_config
    classifies = model.runner_type == "pooling" and model.convert_type == "classify"
    return int(model.hf_config.num_labels) if classifies else 0


def _head_bytes(config: Any, labels: int) -> int:
    """What an adapter's own head of so many labels takes in the engine of ``config`` (VllmConfig)."""
    if not labels:
        return 0
    model = config.model_config
    return sizing.head_bytes(
        labels,
        int(model.get_hidden_size()),
        itemsize=config.lora_config.lora_dtype.itemsize,
        bias_itemsize=model.head_dtype.itemsize,
    )


def _slot_layers(config: Any) -> list[Layer]:
    """What a slot of the engine that ``config`` (VllmConfig) describes has room for."""
    model, lora = config.model_config, config.lora_config
    if model.is_multimodal_model or config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            "the slots of a multimodal model, or of one in pipeline stages, are not computed;"
            " give GPU_SLOTS and HOST_SLOTS as numbers"
        )
    if model.is_moe and (config.parallel_config.enable_expert_parallel or lora.enable_moe_shared_loras):
        raise ValueError(
            "the slots of a mixture whose experts are divided among workers, or share their adapters, are not"
            " computed; give GPU_SLOTS and HOST_SLOTS as numbers"
        )
    implementation = get_model_cls(model)
    # A classifier's head has room for a pair, too, which none is served on.
    heads = [Layer(model.get_hidden_size(), labels, served=False)] if (labels := _head_labels(config)) else []
    return heads + lora_layers(
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


def choose_parsers(settings: Settings) -> tuple[Settings, Parsers, BaseTokenizer]:
    """(``settings`` with vLLM's parsers in ENGINE_ARGS, which they are, the tokenizer); see ``parsers_of``.

    What ENGINE_ARGS say goes before the settings. A parser that was guessed, and that the model's tokenizer
    does not suit, is left out with a warning; then tool calls are read in the commonest form. ValueError for
    a name that vLLM does not know.
    """
    given = settings.engine_args
    structured = given.get("structured_outputs_config")
    structured = structured if isinstance(structured, dict) else {}
    chat = read_base_chat(
        str(given.get("tokenizer") or settings.model),
        trust_remote_code=bool(given.get("trust_remote_code")),
    )
    template = _template_given(given.get("chat_template")) or chat.template
    tools = str(given.get("tool_call_parser") or settings.tool_parser)
    named = given.get("reasoning_parser") or structured.get("reasoning_parser")
    reasoning = str(named or settings.reasoning_parser)
    found = parsers_of(template, chat.model_type, tools=tools, reasoning=reasoning)
    read = _usable("TOOL_PARSER", _tool_parsers(), found.tools, chat, guessed=tools == AUTO)
    if read is None and found.tools not in (None, UNSHOWN):
        other = _usable("TOOL_PARSER", _tool_parsers(), UNSHOWN, chat, guessed=True)
        read, found = other, replace(found, tools_guessed=found.tools_shown)
    found = replace(
        found,
        tools=read,
        reasoning=_usable(
            "REASONING_PARSER", _reasoning_parsers(), found.reasoning, chat, guessed=reasoning == AUTO
        ),
    )
    logger.info("tool calls are read as %s, reasoning as %s", found.tools, found.reasoning)
    if found.tools is not None and not found.tools_shown:
        logger.info("the chat template shows no tools to the model: it calls them where it is made to")
    if found.tools_guessed:
        logger.warning(
            "no parser is known for the form in which the chat template shows tools: calls are read as %s"
            " and may come back as text. Set TOOL_PARSER to one of vLLM's, or to none",
            found.tools,
        )
    # JSON without blanks between its parts, unless ENGINE_ARGS want them: a small model that may write a
    # blank goes on writing them until its answer is cut off.
    written = {"disable_any_whitespace": True, **structured, "backend": "xgrammar"}
    parsing = {
        "tool_call_parser": found.tools,
        "enable_auto_tool_choice": given.get("enable_auto_tool_choice", True) and found.tools is not None,
        # vLLM's front end and its core both read it from here.
        "structured_outputs_config": written | {"reasoning_parser": found.reasoning or ""},
        # For the core to count the tokens of a thought, which a request may bound.
        "reasoning_parser": found.reasoning or "",
    }
    kept = {name: value for name, value in given.items() if name != "reasoning_parser"}
    chosen = settings.model_copy(update={"engine_args": kept | parsing})
    return chosen, found, replace(chat, template=template)


def chat_of(config: Any, found: BaseTokenizer) -> BaseChat:
    """How the base of ``config`` (VllmConfig) chats, for uploads to be compared with."""
    model = config.model_config
    generation = model.try_get_generation_config() or {}
    given = generation.get("eos_token_id")
    stops = set(given if isinstance(given, list) else [given])
    if found.tokenizer is not None:
        stops.add(found.tokenizer.eos_token_id)
    return described(
        found,
        template=found.template,
        vocabulary=int(model.get_vocab_size()),
        stop_token_ids=tuple(sorted(one for one in stops if isinstance(one, int))),
    )


def _template_given(path: Any) -> str | None:
    try:
        return Path(str(path)).read_text() if path else None
    except (OSError, ValueError):
        return str(path)  # vLLM takes a template itself, too


def _tool_parsers() -> Any:
    from vllm.parser import ParserManager
    from vllm.tool_parsers import ToolParserManager

    def get(name: str) -> Any:
        return ParserManager.get_parser(tool_parser_name=name, enable_auto_tools=True)

    return ToolParserManager, ToolParserManager.get_tool_parser, get


def _reasoning_parsers() -> Any:
    from vllm.parser import ParserManager
    from vllm.reasoning import ReasoningParserManager

    def get(name: str) -> Any:
        return ParserManager.get_parser(reasoning_parser_name=name)

    return ReasoningParserManager, ReasoningParserManager.get_reasoning_parser, get


def _usable(
    setting: str, registry: Any, name: str | None, chat: BaseTokenizer, *, guessed: bool
) -> str | None:
    manager, get, composed = registry
    if name is None:
        return None
    if name not in (known := manager.list_registered()):
        raise ValueError(f"{setting}: vLLM has no parser {name!r}; it has {', '.join(sorted(known))}")
    if not guessed or chat.tokenizer is None:
        return name
    try:
        get(name)(chat.tokenizer)
        composed(name)  # of some it needs a package that is not vLLM's
    except Exception as exc:  # each parser raises its own
        logger.warning("the parser %s, which the chat template calls for, cannot be used: %s", name, exc)
        return None
    return name


def want_batch_invariance(settings: Settings) -> None:
    """Asks vLLM for kernels whose sums do not depend on the batch, if ``settings`` do.

    To be called before the engine's processes start. ValueError where this build has none.
    """
    if not settings.batch_invariant:
        return
    if current_platform.is_cpu():
        raise ValueError(
            "BATCH_INVARIANT needs a GPU: vLLM has no such kernels for a CPU. Leave it off here."
        )
    os.environ["VLLM_BATCH_INVARIANT"] = "1"


def exact_on(settings: Settings, config: Any) -> str | None:
    """What kind of devices, and how many, give answers of the same bits in any batch; None if none do."""
    if not settings.batch_invariant:
        return None
    return f"{current_platform.get_device_name()} x {config.parallel_config.world_size}"


def log_advice(config: Any, base: BaseModel) -> None:
    """What whoever operates the engine that ``config`` (VllmConfig) describes may not know."""
    if base.head is not None and base.head.most == 0:
        logger.warning(
            "adapters with a head of their own are refused here: they need one worker, slots that are not"
            " shared (RANK_SLOTS), and a head that vLLM can replace. Others answer by the base's head."
        )
    bfloat16_on_cpu = current_platform.is_cpu() and str(config.model_config.dtype) == "torch.bfloat16"
    if bfloat16_on_cpu and not multiplies_bfloat16():
        logger.warning(
            'this processor has no instructions for bfloat16: with ENGINE_ARGS=\'{"dtype": "float32"}\''
            " batches and prompts are multiplied two to three times as fast, and the base model takes"
            " twice the memory"
        )


def capacity_of(
    slots: Slots, base: BaseModel, described: Sequence[dict[str, Any]], config: Any
) -> EngineCapacity:
    """By what the workers of the engine that ``config`` (VllmConfig) describes have really allocated."""
    slot = max(int(one["slot_bytes"]) for one in described)
    if slots.slot_bytes not in (None, slot):
        logger.warning(
            "a slot was computed to take %d bytes and takes %d: give GPU_SLOTS and HOST_SLOTS as numbers",
            slots.slot_bytes,
            slot,
        )
    apart = any(".experts.0." in module for module in base.modules)
    layers = [
        Layer(shape.in_features * shape.experts, shape.out_features * shape.experts)
        for shape in base.modules.values()
        if shape.experts == 1 or not apart  # an adapter has its experts in one form
    ]
    layers += [Layer(shape.in_features, shape.out_features) for shape in base.vocabulary.values()]
    itemsize = config.lora_config.lora_dtype.itemsize
    whole = sizing.entry_bytes(layers, rank=base.max_lora_rank, itemsize=itemsize)
    if base.head is not None:
        whole += _head_bytes(config, base.head.most or 0)
    entry = sum(whole if one["entry_bytes"] is None else int(one["entry_bytes"]) for one in described)
    if slots.adapters:
        ranks = slots.gpu * base.max_lora_rank
        return EngineCapacity(slots.adapters, slots.host, slot, entry, slots.gpu, ranks)
    return EngineCapacity(slots.gpu, slots.host, slot, entry)


def vllm_arguments(settings: Settings, slots: Slots) -> tuple[Namespace, Any]:
    """(arguments of vLLM's OpenAI front end, AsyncEngineArgs) for ``settings`` with ``slots``."""
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
    # A bar is no log line. Of a mixture of experts vLLM then reads adapters in both forms that PEFT saves.
    given: dict[str, Any] = {"use_tqdm_on_load": False, "enable_mixed_moe_lora_format": True}
    if current_platform.is_cpu():
        given |= {
            # What adapters.worker.cpu.kernels multiplies fastest.
            "lora_dtype": STR_DTYPE_TO_TORCH_DTYPE["float32"],
            # As a class: vLLM looks for what it supports on it, which a name does not have.
            "distributed_executor_backend": YieldingExecutor,
        }
    if settings.traces_url:
        # vLLM's own span of a request, in the trace that ``Metered.generate`` hands on.
        os.environ.setdefault("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        given["otlp_traces_endpoint"] = f"{settings.traces_url.rstrip('/')}/v1/traces"
    given |= settings.engine_args
    # Without a list vLLM fetches what a customer names from any host, those of the server's own network too.
    given["allowed_media_domains"] = given.get("allowed_media_domains") or [NO_HOST]
    os.environ.setdefault("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")
    base = read_base_config(Path(settings.model))
    # Neither goes with adapters that are divided in full.
    others = settings.rank_slots or os.environ.get("VLLM_LORA_ENABLE_DUAL_STREAM", "0") != "0"
    if not others and divides_in_full(base, given, rank=settings.max_lora_rank):
        given.setdefault("fully_sharded_loras", True)
    if served := layers_served(base, given, shared=bool(settings.rank_slots)):
        given.setdefault("lora_target_modules", served)
    if (labels := labels_of(base or {})) or given.get("convert") == "classify":
        given.setdefault("max_lora_cls_labels", max(LABELS, labels))
    ours_for_workers = {ADAPTERS: slots.adapters} if slots.adapters else {}
    if settings.dora_on_gpu and current_platform.is_cuda_alike():
        ours_for_workers[DORA] = 1
    if ours_for_workers:
        given["additional_config"] = (given.get("additional_config") or {}) | ours_for_workers
    looked_at = {name for names in SERVED_ENGINE_ARGS.values() for name in names}.union(ONE_ENGINE_ARGS)
    for name, value in given.items():
        if name in known - looked_at:
            logger.warning("ENGINE_ARGS: %s is new in vLLM, and what it does to customers is not known", name)
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


def _vocabulary_of(described: Sequence[dict[str, Any]]) -> dict[str, ModuleShape]:
    """Of one worker alone: where several share the model, it takes no adapters."""
    found = described[0].get("vocabulary", {}) if len(described) == 1 else {}
    return {module: ModuleShape(*shape) for module, shape in found.items()}


def _head_of(described: Sequence[dict[str, Any]]) -> Head | None:
    """A classifier's, which the last of several workers has; adapters have none of their own there."""
    found = next((one["head"] for one in reversed(described) if one.get("head")), None)
    if found is None:
        return None
    name, inputs, labels, most = found
    return Head(name, inputs, labels, most if len(described) == 1 else 0)


def head_of(base: BaseModel, config: Any, task: str | None) -> Head | None:
    """Of ``base`` where vLLM's ``task`` is to classify: also one that takes no adapter's own in its place."""
    if task != "classify":
        return None
    model = config.model_config
    return base.head or Head("", int(model.get_hidden_size()), int(model.hf_config.num_labels), 0)


def base_model_of(name: str, described: Sequence[dict[str, Any]]) -> BaseModel:
    """The whole model out of its workers' accounts: pipeline stages each know their own layers."""
    modules: dict[str, ModuleShape] = {}
    for one in described:
        modules.update({module: ModuleShape(*shape) for module, shape in one["modules"].items()})
    return BaseModel(
        name=name,
        modules=dict(sorted(modules.items())),
        aliases={alias: module for one in described for alias, module in one["aliases"].items()},
        vocabulary=_vocabulary_of(described),
        max_lora_rank=described[0]["max_lora_rank"],
        dora=len(described) == 1 and described[0]["dora"],
        head=_head_of(described),
        fused={suffix: tuple(parts) for suffix, parts in described[0]["fused"].items()},
    )

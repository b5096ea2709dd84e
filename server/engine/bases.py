"""Which bases the engine here cannot serve, said before one is loaded where its config.json tells.

Imported by ``Engine.start`` alone, as ``server.engine.arguments`` is.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from vllm.platforms import current_platform

from adapters.inspection.base_config import quantization_in, read_base_config, read_hub_config
from server.engine import quantization
from server.settings import Settings

logger = logging.getLogger(__name__)

# Where configs say how many experts a layer has: vLLM's list (``model_arch_config_convertor.py``).
_EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")


def refuse_what_cannot_load(settings: Settings) -> None:
    """ValueError for a base that cannot be served on this machine, or not as ENGINE_ARGS say.

    Reads its config.json, in its folder or from the hub, and no weights. Where that cannot be had nothing is
    known yet: vLLM says why.
    """
    if current_platform.is_cpu() and settings.engine_args.get("pipeline_parallel_size", 1) != 1:
        raise ValueError(
            "ENGINE_ARGS: pipeline_parallel_size needs a GPU: on a CPU vLLM gives the second stage no memory"
            " for what the first one computes. Use tensor_parallel_size."
        )
    if settings.rank_slots and settings.engine_args.get("pipeline_parallel_size", 1) != 1:
        raise ValueError(
            "RANK_SLOTS: an adapter has other ranks on each stage of a pipeline, and a place in each is not"
            " counted. Set it to 0, or use tensor_parallel_size alone."
        )
    config = _config_of(settings)
    if settings.dora_on_gpu and (reason := _no_dora(settings, config or {})) is not None:
        raise ValueError(f"DORA_ON_GPU: {reason}. Switch it off, or serve such adapters merged.")
    if config is None:
        return
    on_cpu = current_platform.is_cpu()
    if on_cpu and has_experts(config):
        raise _experts(settings.model)
    if settings.engine_args.get("convert") == "classify":
        _refuse_headless(config, settings)
    if (found := quantization_in(config)) is not None:
        amx = torch.cpu._is_amx_tile_supported()
        quantization.refuse(
            found, dtype=str(settings.engine_args.get("dtype", "auto")), on_cpu=on_cpu, amx=amx
        )


def _config_of(settings: Settings) -> dict[str, Any] | None:
    """As ``read_base_config``; of a hub's id what the hub or its cache has, which vLLM reads next.

    ENGINE_ARGS may name another place for it (``hf_config_path``), and change it (``hf_overrides``).
    """
    given = settings.engine_args
    place = str(given.get("hf_config_path") or settings.model)
    if Path(place).exists():
        config = read_base_config(Path(place))
    else:
        try:
            config = read_hub_config(place, revision=given.get("revision"), token=given.get("hf_token"))
        except OSError as exc:
            logger.info("the config.json of %s is not known before it is loaded: %s", place, exc)
            return None
    changes = given.get("hf_overrides")
    return _overridden(config, changes) if config is not None and isinstance(changes, dict) else config


def _overridden(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """As vLLM's ``ModelConfig`` does it: configs within ``config`` are changed, all else is replaced."""
    changed = dict(config)
    for name, value in changes.items():
        within = None if name == "quantization_config" else config.get(name)
        if isinstance(value, dict) and isinstance(within, dict):
            value = _overridden(within, value)
        changed[name] = value
    return changed


def _no_dora(settings: Settings, config: dict[str, Any]) -> str | None:
    """Why the engine cannot serve DoRA, which scales what one worker makes of whole weights."""
    given = settings.engine_args
    if any(given.get(f"{how}_parallel_size", 1) != 1 for how in ("tensor", "pipeline")):
        return "a DoRA is served by one worker, and ENGINE_ARGS ask for several"
    if settings.rank_slots:
        return "adapters that share slots (RANK_SLOTS) are no DoRAs"
    if given.get("fully_sharded_loras"):
        return "with fully_sharded_loras, in ENGINE_ARGS, vLLM's layers add adapters elsewhere"
    if os.environ.get("VLLM_LORA_ENABLE_DUAL_STREAM", "0") != "0":
        return "with VLLM_LORA_ENABLE_DUAL_STREAM vLLM adds adapters elsewhere"
    asked = given.get("quantization") or given.get("quantization_config")
    if asked or quantization_in(config) is not None:
        return "the scale of a DoRA is computed from weights that are not quantized, and those of MODEL are"
    return "the experts of a mixture are not scaled" if has_experts(config) else None


def refuse_what_cannot_run(config: Any) -> None:
    """ValueError for a model that the engine of ``config`` (VllmConfig) loads and then cannot run."""
    if current_platform.is_cpu() and config.model_config.is_moe:
        raise _experts(config.model_config.model)


def has_experts(config: dict[str, Any]) -> bool:
    """Whether a config.json describes a mixture of experts, or a model around one."""
    inner = [part for name in ("text_config", "llm_config") if isinstance(part := config.get(name), dict)]
    blocks = config.get("block_configs")
    inner += [block for block in (blocks if isinstance(blocks, list) else ()) if isinstance(block, dict)]
    return any(part.get(name) for part in (config, *inner) for name in _EXPERTS)


def _experts(model: str) -> ValueError:
    return ValueError(
        f"MODEL: {model} is a mixture of experts, which needs a GPU: with LoRA, vLLM multiplies experts by"
        " Triton kernels, which this CPU build does not have. Serve a dense model here."
    )


def _refuse_headless(config: dict[str, Any], settings: Settings) -> None:
    """A checkpoint that makes text has no head, unless one is made of its vocabulary's."""
    texts = all(name.endswith("ForCausalLM") for name in config.get("architectures") or ())
    if texts and "classifier_from_token" not in config:
        raise ValueError(
            f"MODEL: {settings.model} makes text and has no head to classify with. Save one with"
            " transformers'"
            ' AutoModelForSequenceClassification, or have one made of two tokens\' rows: "hf_overrides":'
            ' {"classifier_from_token": ["no", "yes"], "method": "no_post_processing"} in ENGINE_ARGS.'
        )

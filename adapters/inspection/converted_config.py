"""The fields of a config that follow its tensors into another form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from adapters.errors import fault
from adapters.inspection.experts import is_stacked, parameter_of
from adapters.inspection.module_names import leaf
from adapters.inspection.peft_config import PeftConfig
from adapters.inspection.strict_json import show
from adapters.model import INITIAL_FILE

# What PEFT's conversion with path_initial_model_for_weight_conversion is for.
CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")


def without_init(fields: Mapping[str, Any]) -> dict[str, Any]:
    init = fields.get("init_lora_weights")
    if not isinstance(init, str) or not init.lower().startswith(CONVERTIBLE):
        raise fault(
            "unexpected_file",
            f"The upload holds {INITIAL_FILE}, and init_lora_weights is {show(init)}, which needs none.",
            param=INITIAL_FILE,
        )
    return {**fields, "init_lora_weights": True}


def of_twice_the_rank(fields: Mapping[str, Any], config: PeftConfig) -> dict[str, Any]:
    """Of the same scaling: alpha grows with the rank, with rsLoRA with its root."""
    factor = math.sqrt(2) if config.use_rslora else 2
    return {
        **fields,
        "r": config.r * 2,
        "lora_alpha": config.lora_alpha * factor,
        "rank_pattern": {key: rank * 2 for key, rank in (config.rank_pattern or {}).items()},
        "alpha_pattern": {key: alpha * factor for key, alpha in (config.alpha_pattern or {}).items()},
    }


def with_patterns_of_parts(
    fields: Mapping[str, Any], config: PeftConfig, parts: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """A key of a fused module becomes one of each of its parts, at the same place in the order."""
    names = {leaf(module): [leaf(part) for part in of] for module, of in parts.items()}
    changed = dict(fields)
    for field in ("rank_pattern", "alpha_pattern"):
        expanded: dict[str, Any] = {}
        for key, value in (fields.get(field) or {}).items():
            parent, dot, last = key.rpartition(".")
            for name in names.get(last, [last]):
                expanded.setdefault(f"{parent}{dot}{name}", value)
        changed[field] = expanded
    return changed


def with_renamed_keys(fields: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A pattern's key that is a module's whole name follows it; suffixes are the same under either name."""
    names = {_in_patterns(old): _in_patterns(new) for old, new in names.items()}
    changed = dict(fields)
    for field in ("rank_pattern", "alpha_pattern"):
        changed[field] = {names.get(key, key): value for key, value in (fields.get(field) or {}).items()}
    return changed


def _in_patterns(module: str) -> str:
    return parameter_of(module) if is_stacked(module) else module


def with_exact_targets(fields: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    modules = set(modules)
    stacked = set(filter(is_stacked, modules))
    return {
        **fields,
        "target_modules": sorted(modules - stacked),
        "target_parameters": sorted(map(parameter_of, stacked)) or None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }

"""What transformers calls the modules of a checkpoint that an older release wrote, and the way back."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Rename = Callable[[str], str]


def todays_names(model_type: str | None) -> Rename:
    """A function from a module's name in a checkpoint of this type to transformers' name: often the same."""
    from transformers.core_model_loading import WeightRenaming

    renamings = [rule for rule in _rules(model_type) if isinstance(rule, WeightRenaming)]
    return _by(renamings)


def checkpoint_names(model_type: str | None) -> Rename:
    """The way back; a name that would not come back from there is left as it is."""
    from transformers.core_model_loading import WeightRenaming

    renamings = [rule for rule in _rules(model_type) if isinstance(rule, WeightRenaming)]
    forward = _by(renamings)
    back = _by([rule.reverse_transform() for rule in reversed(renamings)])

    def renamed(module: str) -> str:
        name = back(module)
        return name if forward(name) == module else module

    return renamed


def parts_of_experts(model_type: str | None) -> tuple[str, str, str]:
    """How a checkpoint calls the gate, up and down projections of an expert that it keeps by itself."""
    found: list[str] = []
    for rule in _rules(model_type):
        if any(re.search(r"experts\W+(?:gate_up|down)_proj$", target) for target in rule.target_patterns):
            found += [part[1] for source in rule.source_patterns if (part := _PART.search(source))]
    gate, up, down = found if len(found) == 3 else ("gate_proj", "up_proj", "down_proj")
    return gate, up, down


_PART = re.compile(r"experts.*\.(\w+)\\?\.weight")


def _by(renamings: list[Any]) -> Rename:
    from transformers.core_model_loading import rename_source_key

    def renamed(module: str) -> str:
        name, _ = rename_source_key(f"{module}.weight", renamings, [])
        return name.removesuffix(".weight")

    return renamed if renamings else lambda module: module


def _rules(model_type: str | None) -> list[Any]:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    rules = get_checkpoint_conversion_mapping(model_type) if model_type else None  # type: ignore[no-untyped-call]
    return list(rules or ())

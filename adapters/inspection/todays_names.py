"""What transformers calls the modules of a checkpoint that an older release wrote."""

from __future__ import annotations

from collections.abc import Callable


def todays_names(model_type: str | None) -> Callable[[str], str]:
    """A function from a module's name in a checkpoint of this type to transformers' name: often the same."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = get_checkpoint_conversion_mapping(model_type) if model_type else None
    renamings = [rule for rule in rules or () if isinstance(rule, WeightRenaming)]

    def renamed(module: str) -> str:
        name, _ = rename_source_key(f"{module}.weight", renamings, [])
        return name.removesuffix(".weight")

    return renamed if renamings else lambda module: module

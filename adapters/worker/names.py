"""What a checkpoint and PEFT call the layers of the running model.

vLLM names some layers otherwise than the checkpoint does, and maps an adapter's names forward with the rules
of the model's own ``hf_to_vllm_mapper``. These rules are not turned around here: names are proposed, and a
name counts only where vLLM's own function maps it onto the layer. Proposed are

    the checkpoint's   the tensors of the served folder
    the rules'         with what a rule puts in taken out again: other releases of transformers say so
    vLLM's own         where no rule changes it
    the text model's   a multimodal model's language model, as PEFT knows it when that was trained by itself
    today's            what transformers makes of the checkpoint's names when it reads it (Mixtral's
                       ``block_sparse_moe`` is its ``mlp``)

A layer of which no name reaches it is left out: an adapter on it would be read and never applied.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from adapters.inspection.todays_names import todays_names

# Parts of names that a rule puts in and that are too short to tell where it did.
_SHORTEST = 4


@dataclass(frozen=True, slots=True)
class Names:
    """``canonical``: vLLM's name of a layer -> the checkpoint's. ``aliases``: another -> the checkpoint's.

    An alias is another name for the same layer, whose adapter may be served once it is renamed.
    """

    canonical: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)


def names_of(
    modules: Sequence[str],
    mapper: Any,
    *,
    known: Iterable[str] = (),
    language_model: str | None = None,
    model_type: str | None = None,
) -> Names:
    """``modules`` are vLLM's; ``mapper`` its ``WeightsMapper`` or None; ``known`` the checkpoint's names.

    ``language_model`` is where a multimodal model keeps its language model, ``model_type`` what transformers
    calls the whole.
    """
    today = todays_names(model_type)
    renames = mapper.get_rename_mapper() if mapper is not None else None
    wanted = set(modules)
    by_module: dict[str, list[str]] = {}
    for name in known:
        module = forward(name, renames)
        if module in wanted:
            by_module.setdefault(module, []).append(name)
    canonical: dict[str, str] = {}
    others: dict[str, set[str]] = {}
    for module in modules:
        guesses = [name for name in _guesses(module, renames) if forward(name, renames) == module]
        found = list(dict.fromkeys([*by_module.get(module, ()), *guesses]))
        if found:
            canonical[module] = found[0]
            alone = _alone(module, language_model)
            for name in [*found[1:], *([alone] if alone else []), today(found[0])]:
                others.setdefault(name, set()).add(found[0])
    taken = set(canonical.values())
    aliases = {name: next(iter(of)) for name, of in others.items() if len(of) == 1 and name not in taken}
    return Names(canonical, aliases)


def checkpoint_modules(folder: Path) -> set[str]:
    """The modules that the weights in ``folder`` belong to; none where it is no folder of safetensors.

    Reads an index or headers, no weights.
    """
    tensors: set[str] = set()
    try:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            tensors.update(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        else:
            for path in folder.glob("*.safetensors"):
                with safe_open(path, framework="pt") as weights:
                    tensors.update(weights.keys())
    except (OSError, ValueError, KeyError, SafetensorError):
        return set()
    return {tensor.rpartition(".")[0] for tensor in tensors}


def forward(name: str, renames: Any) -> str:
    """vLLM's name for the layer that it applies an adapter's tensors called ``name`` to.

    ``renames``: its ``WeightsMapper.get_rename_mapper()``, or None.
    """
    from vllm.lora.utils import parse_fine_tuned_lora_name

    module, _ = parse_fine_tuned_lora_name(f"base_model.model.{name}.lora_A.weight", renames)
    return str(module)


def _guesses(module: str, renames: Any) -> Iterator[str]:
    """``module`` with what the rules put in taken out again, the most changed first, then as it is."""
    if renames is not None:
        undone = _without_infixes(module, renames.orig_to_new_substr)
        prefixes = renames.orig_to_new_prefix.items()
        for old, new in sorted(prefixes, key=lambda rule: (-len(rule[1]), -len(rule[0]))):
            if undone.startswith(new):
                yield old + undone.removeprefix(new)
        yield undone
    yield module


def _without_infixes(module: str, rules: Mapping[str, str]) -> str:
    for old, new in reversed(list(rules.items())):
        if len(new) >= _SHORTEST and f"{module}.".count(new) == 1:
            module = f"{module}.".replace(new, old).removesuffix(".")
    return module


def _alone(module: str, language_model: str | None) -> str | None:
    """``language_model.model.layers.0`` -> ``model.layers.0``; ``language_model`` may end in ``model``."""
    if not language_model:
        return None
    prefix = language_model.rstrip(".") + "."
    inner = module.removeprefix(prefix)
    if inner == module:
        return None
    if inner.startswith("layers."):
        inner = f"model.{inner}"
    return inner if inner.startswith("model.") else None

"""The experts and routers of a mixture, as transformers 5 holds them: parameters, where others have layers.

They are told under the checkpoint's names, in both forms in which adapters on them are served; see
``adapters.inspection.experts``. Stacked is (experts, outputs, inputs), in GPT-OSS (experts, inputs, outputs).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adapters.inspection.todays_names import checkpoint_names, parts_of_experts
from adapters.model import ModuleShape


@dataclass(frozen=True, slots=True)
class Mixture:
    """``modules`` by the checkpoint's names; ``aliases`` from transformers' names, where they are others."""

    modules: Mapping[str, ModuleShape]
    aliases: Mapping[str, str]


def mixture_of(model: Any, model_type: str) -> Mixture | None:
    """Of a ``model`` of transformers; None where it has no experts."""
    blocks = {name.rpartition(".")[0] for name, module in model.named_modules() if is_experts(module)}
    if not blocks:
        return None
    known, parts = checkpoint_names(model_type), parts_of_experts(model_type)
    modules: dict[str, ModuleShape] = {}
    aliases: dict[str, str] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[0] not in blocks:
            continue
        shapes = dict(_stacked(name, module)) if is_experts(module) else _router(name, module)
        modules |= {known(today): shape for today, shape in shapes.items()}
        aliases |= {today: known(today) for today in shapes if known(today) != today}
        if is_experts(module):
            modules |= _apart(known(name), module, parts)
    return Mixture(modules, aliases)


def is_experts(module: Any) -> bool:
    """Whether ``module`` holds a mixture's experts, with a gate, in two tensors."""
    shapes = {name: weight.ndim for name, weight in module.named_parameters(recurse=False)}
    return shapes.get("gate_up_proj") == 3 and shapes.get("down_proj") == 3


def _sizes(module: Any) -> tuple[int, int, int]:
    """(experts, hidden, inner)."""
    experts, outputs, inputs = module.down_proj.shape
    transposed = bool(getattr(module, "is_transposed", False))
    return (experts, inputs, outputs) if transposed else (experts, outputs, inputs)


def _stacked(name: str, module: Any) -> Iterator[tuple[str, ModuleShape]]:
    experts, hidden, inner = _sizes(module)
    yield f"{name}.base_layer", ModuleShape(hidden, 2 * inner, experts)
    yield name, ModuleShape(inner, hidden, experts)


def _apart(name: str, module: Any, parts: tuple[str, str, str]) -> dict[str, ModuleShape]:
    experts, hidden, inner = _sizes(module)
    gate, up, down = parts
    into, back = ModuleShape(hidden, inner), ModuleShape(inner, hidden)
    of_each = {gate: into, up: into, down: back}
    return {f"{name}.{n}.{part}": shape for n in range(experts) for part, shape in of_each.items()}


def _router(name: str, module: Any) -> dict[str, ModuleShape]:
    """A matrix beside the experts, which transformers mostly keeps in a class of its own."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or weight.ndim != 2:
        return {}
    return {name: ModuleShape(weight.shape[1], weight.shape[0])}

"""Adapters on the experts of a mixture, in the two forms that PEFT saves and vLLM reads.

    stacked     ``target_parameters``: one pair for the experts of a layer together. PEFT calls the pair of
                ``gate_up_proj`` ``…experts.base_layer`` and that of ``down_proj`` ``…experts``. lora_A is
                (experts x rank, in), expert by expert; lora_B (out, rank x experts), rank by rank.
    apart       linear layers, ``…experts.7.gate_proj``: a pair for each, as older models of transformers had

vLLM packs a layer's experts together: all of them, each projection with one rank, in one form for the whole
adapter. What it would end the load for, or serve in part, is refused here.

From transformers 5 on, PEFT itself turns ``all-linear`` and the projections' names into
``target_parameters``. The router is then one of them, ``gate.weight``: a matrix, whose pair is like a linear
layer's. The patterns get the key ``.*\\.gate_up_proj`` (``peft/utils/transformers_weight_conversion.py``), an
expression that says what the name says.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch

from adapters.errors import AdapterRejected, fault
from adapters.inspection.module_names import suffixes
from adapters.inspection.strict_json import show
from adapters.model import WEIGHTS_FILE, BaseModel

_STACKED = re.compile(r"(?P<layer>(?:.+\.)?experts)(?P<inner>\.base_layer)?")
_APART = re.compile(r"(?P<layer>(?:.+\.)?experts)\.(?P<expert>\d+)\.(?P<projection>[^.]+)")
# What PEFT makes of a name; see the top.
_ANY_WITH = re.compile(r"\.\*\\\.(?P<name>[A-Za-z0-9_]+)")
_PATTERNS = ("rank_pattern", "alpha_pattern")


def parameter_of(module: str) -> str:
    """What ``target_parameters`` calls the weight that a pair changes."""
    found = _STACKED.fullmatch(module)
    if found is None:
        return f"{module}.weight"
    return f"{found['layer']}.{'gate_up_proj' if found['inner'] else 'down_proj'}"


def is_stacked(module: str) -> bool:
    return _STACKED.fullmatch(module) is not None


def unknown_parameters(named: Collection[str], base: BaseModel) -> list[str]:
    """Those of ``named``, whole names or ends of them, that are no weights on which adapters are served."""
    left = set(named)
    for module in (*base.modules, *base.aliases) if left else ():
        left.difference_update(suffixes(parameter_of(module)))
    return [name for name in named if name in left]


def with_literal_patterns(fields: Mapping[str, Any]) -> dict[str, Any]:
    """``fields`` of a config with names for the expressions that PEFT itself makes of them."""
    return {
        **fields,
        **_with_keys(fields, lambda key: found["name"] if (found := _ANY_WITH.fullmatch(key)) else key),
    }


def of_modules(fields: Mapping[str, Any], parameters: Collection[str]) -> dict[str, Any]:
    """``fields`` with the keys for ``parameters``, weights of linear layers, as keys for these layers.

    vLLM knows the patterns of a layer by its name alone.
    """
    named = {suffix for name in parameters for suffix in suffixes(name)} - {"weight"}
    return {**fields, **_with_keys(fields, lambda key: key.removesuffix(".weight") if key in named else key)}


def _with_keys(fields: Mapping[str, Any], renamed: Callable[[str], str]) -> dict[str, Any]:
    """The patterns with other keys; of two that become one the first counts, as of two that match."""
    changed: dict[str, Any] = {}
    for field in _PATTERNS:
        if isinstance(fields.get(field), dict):
            changed[field] = {}
            for key, value in fields[field].items():
                changed[field].setdefault(renamed(key), value)
    return changed


def check_experts(ranks: Mapping[str, int], base: BaseModel) -> None:
    """``ranks`` of the adapted modules. Raises AdapterRejected (``experts_incomplete``)."""
    stacked = {module for module in ranks if is_stacked(module)}
    apart: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for module, rank in ranks.items():
        if found := _APART.fullmatch(module):
            apart[found["layer"], found["projection"]][module] = rank
    if stacked and apart:
        raise _refuse("some experts are adapted together and some apart.")
    for module in stacked:
        layer = _STACKED.fullmatch(module)["layer"]  # type: ignore[index]
        _check_all((layer, f"{layer}.base_layer"), stacked)
    for layer in {layer for layer, _ in apart}:
        _check_all(
            (name for name in base.modules if name.startswith(f"{layer}.") and _APART.fullmatch(name)), ranks
        )
    for (layer, projection), of in apart.items():
        if len(set(of.values())) > 1:
            raise _refuse(f"the experts of {show(layer)} have different ranks for {show(projection)}.")


def per_expert(a: torch.Tensor, b: torch.Tensor, experts: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(lora_A, lora_B) of each expert of a stacked pair: (rank, in) and (out, rank)."""
    of_b = b.reshape(b.shape[0], -1, experts)
    return ((part, of_b[:, :, expert]) for expert, part in enumerate(a.chunk(experts)))


def _check_all(needed: Iterable[str], adapted: Iterable[str]) -> None:
    adapted = set(adapted)
    if missing := [module for module in needed if module not in adapted]:
        raise _refuse(f"{show(missing[0])} is not adapted beside the others of its layer.")


def _refuse(message: str) -> AdapterRejected:
    return fault("experts_incomplete", f"{WEIGHTS_FILE}: {message}", param=WEIGHTS_FILE)

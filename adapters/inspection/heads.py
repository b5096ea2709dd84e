"""The head of a classifier or a reward model that is an adapter's own: ``modules_to_save: ["score"]``.

PEFT trains it whole for the task ``SEQ_CLS``, with as many labels as the customer has, and saves it beside
the pairs, ``base_model.model.score.weight`` (labels, hidden size). vLLM keeps one for each slot and
multiplies the pooled hidden state of each request by its adapter's (``ClassificationHeadWithLoRA``). What it
does not check, and would serve as the base's head or not at all, is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from adapters.errors import AdapterRejected, fault
from adapters.inspection.safetensors_header import TensorHeader
from adapters.inspection.strict_json import show
from adapters.inspection.tensor_stats import TORCH_DTYPES, extremes
from adapters.model import WEIGHTS_FILE, BaseModel

PREFIX = "base_model.model."
# What PEFT writes into ``modules_to_save`` for the task, whichever of them the model has.
NAMES = frozenset({"score", "classifier"})


def may_save(modules: Any, base: BaseModel) -> bool:
    """Whether ``modules_to_save`` says no more than that the adapter has a head of its own, and may."""
    head = base.head
    if head is None or head.most == 0 or not isinstance(modules, list):
        return False
    return head.module in modules and all(name in NAMES for name in modules)


def why_not(modules: Any, base: BaseModel) -> str | None:
    """Why a head that ``modules_to_save`` names is not served on a base with one; None for anything else."""
    named = isinstance(modules, list) and modules and all(name in NAMES for name in modules)
    if not named or base.head is None or base.head.most != 0:
        return None
    return (
        "an adapter's own head is served by one worker alone, in slots that are not shared (RANK_SLOTS), and"
        " in place of a head that vLLM can replace"
    )


def heads_of(tensors: Mapping[str, TensorHeader], base: BaseModel) -> dict[str, TensorHeader]:
    """The tensors of an adapter's own head, by name; none where the base has no head."""
    if base.head is None:
        return {}
    names = {f"{PREFIX}{base.head.module}.{what}" for what in ("weight", "bias")}
    return {name: tensor for name, tensor in tensors.items() if name in names}


def without_heads(tensors: Mapping[str, TensorHeader], base: BaseModel) -> dict[str, TensorHeader]:
    heads = heads_of(tensors, base)
    return {name: tensor for name, tensor in tensors.items() if name not in heads}


def check_head(tensors: Mapping[str, TensorHeader], saves: Any, base: BaseModel) -> int | None:
    """How many labels the head among ``tensors`` has; None where there is none.

    ``saves`` is ``modules_to_save`` of the config. Raises AdapterRejected (``head_mismatch``).
    """
    heads, head = heads_of(tensors, base), base.head
    if head is None or not (heads or saves):
        return None
    weight = heads.get(f"{PREFIX}{head.module}.weight")
    if not saves or weight is None:
        found = "the weights have a head" if heads else "the config has a head"
        lacking = "the config has none" if heads else "the weights have none"
        raise _refuse(f"{found}, {show(head.module)}, and {lacking}.")
    if len(weight.shape) != 2 or weight.shape[1] != head.in_features:
        raise _refuse(f"{head.module}.weight is {weight.shape}, and (labels, {head.in_features}) is needed.")
    labels = weight.shape[0]
    bias = heads.get(f"{PREFIX}{head.module}.bias")
    if bias is not None and bias.shape != (labels,):
        raise _refuse(f"{head.module}.bias is {bias.shape}, and ({labels},) is needed.")
    if not labels or (head.most is not None and labels > head.most):
        raise _refuse(f"it has {labels} labels, and 1 to {head.most} are served.")
    return labels


def check_values(path: Path, tensors: Mapping[str, TensorHeader], base: BaseModel, dtype: str | None) -> None:
    """Raises AdapterRejected where the head in the file ``path`` is not finite, as served in ``dtype``."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in heads_of(tensors, base):
                tensor = file.get_tensor(name)
                found = extremes(tensor)
                served = TORCH_DTYPES[dtype] if dtype else tensor.dtype
                if not torch.isfinite(found.to(served)).all():
                    raise fault(
                        "weights_not_finite",
                        f"{WEIGHTS_FILE}: tensor {show(name)} holds NaN or infinity, or what {served} cannot"
                        " hold.",
                        param=WEIGHTS_FILE,
                    )
    except SafetensorError as error:
        raise fault("weights_invalid", f"{WEIGHTS_FILE}: safetensors cannot read it: {error}.") from None


def _refuse(message: str) -> AdapterRejected:
    return fault("head_mismatch", f"{WEIGHTS_FILE}: {message}", param=WEIGHTS_FILE)

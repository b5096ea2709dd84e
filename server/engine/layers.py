"""The layers of a base model that vLLM makes room in a slot for, known before any weight is loaded.

``transformers`` builds the model on torch's meta device, which holds shapes and no data. Its linear layers
are those of the checkpoint; vLLM fuses some of them, which changes no size. Of a mixture's experts it makes
room for gate, up and down of each, which the workers share as they do dense layers of those names. What
cannot be told in this way (convolutions, an architecture that transformers does not have) is refused rather
than guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from adapters.inspection.base_model import on_meta
from server.engine.sizing import Layer, Split

SERVED = ("embed_tokens", "lm_head")  # of the vocabulary
# Mixtures whose every layer is counted here as vLLM makes it, by transformers' ``model_type``.
MIXTURES = ("mixtral", "qwen3_moe")
_GIVE_A_NUMBER = "give GPU_SLOTS and HOST_SLOTS as numbers"


def lora_layers(
    config: Any,
    *,
    vocabulary: Sequence[str],
    fused: Mapping[str, Sequence[str]],
    targets: Sequence[str] | None,
    workers: int = 1,
    trust_remote_code: bool = False,
) -> list[Layer]:
    """The layers of the model that ``config`` (of transformers) describes.

    ``vocabulary`` names the embeddings that vLLM adapts too (``embed_tokens``, ``lm_head``), ``fused`` the
    layers that it joins, with their parts, and ``targets`` the only ones that it adapts, if not all.
    ``workers`` share each layer: how is told for more than one only. Raises ValueError.
    """
    model = _on_meta(config, trust_remote_code)
    _check_known(model, config)
    plan = model.tp_plan or {}
    layers = []
    for name, module in model.named_modules():
        suffix = name.rpartition(".")[2]
        if targets is not None and not _is_target(name, suffix, fused, targets):
            continue
        if module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if suffix in vocabulary:
                outputs, inputs = module.weight.shape
                served = workers == 1 and suffix in SERVED
                layers.append(Layer(inputs, outputs, served=served, scaled=False))
        elif _is_experts(module):
            layers += _experts(module, workers)
        elif _is_router(name, module):
            experts, inputs = module.weight.shape
            layers.append(Layer(inputs, experts))
        elif _is_linear(module):
            outputs, inputs = module.weight.shape
            unit = _head_size(config) if suffix in ("k_proj", "v_proj") else 1
            split = _split(name, plan) if workers > 1 else "none"
            layers.append(Layer(inputs, outputs, split, unit))
    if not any(layer.served for layer in layers):
        raise ValueError(f"{type(model).__name__} has no layer that LoRA is served on; {_GIVE_A_NUMBER}")
    return layers


def _on_meta(config: Any, trust_remote_code: bool) -> Any:
    try:
        return on_meta(config, trust_remote_code=trust_remote_code)
    except Exception as exc:  # code of the model's own, for a model that nobody here has seen
        raise ValueError(
            f"the shapes of {type(config).__name__} cannot be derived ({exc}); {_GIVE_A_NUMBER}"
        ) from exc


def _check_known(model: Any, config: Any) -> None:
    """Every matrix is one of a linear layer or an embedding, or of a mixture that is known."""
    from torch import nn

    mixture = getattr(config, "model_type", "") in MIXTURES
    for name, module in model.named_modules():
        known = isinstance(module, nn.Linear | nn.Embedding) and ".experts." not in name
        known = known or (mixture and (_is_experts(module) or _is_router(name, module)))
        if not known and any(p.ndim > 1 for p in module.parameters(recurse=False)):
            raise ValueError(
                f"{type(config).__name__}: what a slot holds for {name} ({type(module).__name__})"
                f" is not known; {_GIVE_A_NUMBER}"
            )


def _is_linear(module: Any) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear)


def _is_experts(module: Any) -> bool:
    """Whether ``module`` holds a mixture's experts, stacked: (experts, outputs, inputs) twice."""
    shapes = {name: weight.ndim for name, weight in module.named_parameters(recurse=False)}
    return shapes == {"gate_up_proj": 3, "down_proj": 3}


def _is_router(name: str, module: Any) -> bool:
    """Whether ``module`` chooses the experts: a matrix that transformers keeps in a class of its own."""
    own = dict(module.named_parameters(recurse=False))
    return name.endswith(".gate") and not _is_linear(module) and own.keys() == {"weight"}


def _experts(module: Any, workers: int) -> list[Layer]:
    count, hidden, inner = module.down_proj.shape
    column: Split = "column" if workers > 1 else "none"
    row: Split = "row" if workers > 1 else "none"
    gate = up = Layer(hidden, inner, column, cut=False)
    return [gate, up, Layer(inner, hidden, row, cut=False)] * count


def _is_target(name: str, suffix: str, fused: Mapping[str, Sequence[str]], targets: Sequence[str]) -> bool:
    """As vLLM's ``is_in_target_modules``, for the layer that it makes of this one, all parts together."""
    together = {suffix, name}
    for whole, parts in fused.items():
        if suffix in parts:
            together |= {whole, *parts}
    return not together.isdisjoint(targets)


def _split(name: str, plan: Mapping[str, str]) -> Split:
    """By transformers' own plan, whose styles are named after what they split."""
    for style in (style for pattern, style in plan.items() if fnmatchcase(name, pattern)):
        if style.startswith("colwise"):
            return "column"
        if style.startswith("rowwise"):
            return "row"
        if style.startswith("replicated"):
            return "none"
    raise ValueError(f"how several workers share {name} is not known; {_GIVE_A_NUMBER}")


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

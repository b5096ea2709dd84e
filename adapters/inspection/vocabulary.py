"""Adapters on the vocabulary: ``lm_head`` and ``embed_tokens``.

    lm_head         a linear layer like others, ``lm_head.lora_A.weight``
    embed_tokens    a table: ``embed_tokens.lora_embedding_A`` (rank, tokens) and ``…_B`` (width, rank)

vLLM serves them on the model classes that list ``embedding_modules``. PEFT writes the whole layer that was
adapted beside the adapter (``save_embedding_layers``), and reads it back over the base's: it is left out here
where it is the base's, number by number, and refused where the training changed it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from adapters.errors import AdapterRejected, fault
from adapters.inspection.dora import Checkpoint
from adapters.inspection.module_names import leaf
from adapters.inspection.strict_json import show
from adapters.model import BaseModel, ModuleShape

HEAD, EMBEDDING = "lm_head", "embed_tokens"
NAMES = (HEAD, EMBEDDING)

_BASES = re.compile(r"(?P<module>.+)\.base_layer(?:\.base_layer)?\.weight")

# Classes of vLLM 0.32 that serve both; a test holds the list against vLLM's own sources.
ARCHITECTURES = frozenset(
    {
        "ApertusForCausalLM", "Exaone4ForCausalLM", "GraniteForCausalLM", "GraniteMoeForCausalLM",
        "InternLM3ForCausalLM", "LlamaForCausalLM", "MiniCPMForCausalLM", "MixtralForCausalLM",
        "NemotronForCausalLM", "PhiMoEForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
        "SolarForCausalLM",
    }
)  # fmt: skip


def is_embedding(module: str) -> bool:
    return leaf(module) == EMBEDDING


def tensor_name(module: str, side: str) -> str:
    """PEFT's name for lora_A or lora_B of ``module``, without its prefix."""
    return f"{module}.lora_embedding_{side}" if is_embedding(module) else f"{module}.lora_{side}.weight"


def whole_layer(name: str, base: BaseModel) -> str | None:
    """The layer of the vocabulary whose whole weight the tensor ``name``, without PEFT's prefix, is."""
    found = _BASES.fullmatch(name)
    return found["module"] if found is not None and found["module"] in base.vocabulary else None


def vocabulary_of(config: Any, model: Any) -> dict[str, ModuleShape]:
    """What a server serves of the vocabulary of ``model`` (of transformers, for ``config``)."""
    if not ARCHITECTURES.intersection(config.architectures or ()):
        return {}
    found = {}
    for name, layer in model.named_modules():
        if layer is model.get_output_embeddings() and leaf(name) == HEAD:
            found[name] = ModuleShape(layer.in_features, layer.out_features)
        elif layer is model.get_input_embeddings() and is_embedding(name):
            found[name] = ModuleShape(layer.num_embeddings, layer.embedding_dim)
    return found


def check_left_out(path: Path, layers: Mapping[str, str], base: BaseModel) -> None:
    """Raises AdapterRejected unless each tensor of the file ``path`` is the base's own weight.

    ``layers``: the tensor's name -> its layer. Reads both, some rows at a time.
    """
    try:
        with Checkpoint(base) as checkpoint, safe_open(path, framework="pt") as weights:
            for name, module in layers.items():
                _check_same(name, module, weights.get_slice(name), checkpoint, base)
    except SafetensorError as error:
        raise fault("weights_invalid", f"{path.name}: safetensors cannot read it: {error}.") from None


def _check_same(name: str, module: str, given: Any, checkpoint: Checkpoint, base: BaseModel) -> None:
    tied = next((other for other in base.vocabulary if is_embedding(other)), module)
    source = module if checkpoint.has(module) else tied
    rows, columns = given.get_shape()
    at = 0
    for at, block in checkpoint.rows(source):
        if block.shape[1] != columns or at + len(block) > rows:
            raise _changed(name, base, f"it is {rows} x {columns}")
        part = given[at : at + len(block)]
        # One of the two may have been rounded to the other's type.
        narrow = min((part.dtype, checkpoint.dtype(source)), key=lambda dtype: dtype.itemsize)
        if not torch.equal(part.to(narrow), block.to(narrow)):
            raise _changed(name, base, f"rows {at} to {at + len(block)} differ")
        at += len(block)
    if at != rows:
        raise _changed(name, base, f"it has {rows} rows, not {at}")


def _changed(name: str, base: BaseModel, how: str) -> AdapterRejected:
    return fault(
        "modules_to_save_unsupported",
        f"tensor {show(name)} is a whole layer of the vocabulary, and not that of {base.name} ({how}): it was"
        " trained, or resized.",
    )

"""A base model as its folder describes it: names and shapes without an engine, and without reading weights.

The running engine reports the same (``adapters.worker.extension``); a test holds the two against each other.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from adapters.inspection.base_config import quantization_in, read_base_config
from adapters.inspection.mixtures import Mixture, mixture_of
from adapters.inspection.module_names import leaf
from adapters.inspection.quantized_names import are_published, bits_in
from adapters.inspection.tensor_stats import TORCH_DTYPES
from adapters.inspection.vocabulary import vocabulary_of
from adapters.model import BaseModel, Head, ModuleShape

# What vLLM and some trainers fuse, in the order of the rows.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

# Elements of each of a few weights that go into a fingerprint.
_SAMPLE = 4096


def read_base(model_dir: Path, *, max_lora_rank: int, name: str | None = None) -> BaseModel:
    """The base model in ``model_dir``, named after the folder. Raises as ``module_shapes`` does."""
    folder = model_dir.absolute()
    modules, vocabulary, head, mixture = _shapes(folder)
    quantized, published = quantized_as(folder)
    leaves = {leaf(module) for module in modules}
    return BaseModel(
        name=name or folder.name,
        modules=modules,
        max_lora_rank=max_lora_rank,
        aliases=mixture.aliases if mixture is not None else {},
        fused={fused: parts for fused, parts in FUSED.items() if leaves.issuperset(parts)},
        source=str(folder),
        fingerprint=fingerprint(folder),
        dora=quantized is None and mixture is None,
        quantized=quantized,
        published_quantized=published,
        vocabulary=vocabulary,
        head=head,
        pooling=head is not None,
    )


class Quantized(NamedTuple):
    """``bits``: how the weights of a model were put into few bits, None where they were not; ``published``:
    whether its makers published it so."""

    bits: str | None = None
    published: bool = False


def quantized_as(model_dir: Path) -> Quantized:
    """Of the model in the folder; of one whose config cannot be read, as of a hub id, nothing is known."""
    try:
        config = read_base_config(model_dir)
    except (OSError, ValueError):
        return Quantized()
    if config is None or (found := quantization_in(config)) is None:
        return Quantized()
    return Quantized(str(bits_in(found)), are_published(config, found))


def module_shapes(model_dir: Path) -> dict[str, ModuleShape]:
    """Every linear layer but the language-model head by its full name, sorted; reads ``config.json`` only.

    Of a mixture also experts and routers, which are parameters to transformers.

    Raises OSError where there is no config, ValueError where transformers does not know the architecture.
    """
    return _shapes(model_dir)[0]


def _shapes(
    model_dir: Path,
) -> tuple[dict[str, ModuleShape], dict[str, ModuleShape], Head | None, Mixture | None]:
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    model = on_meta(config)
    head = model.get_output_embeddings()
    shapes = {
        name: ModuleShape(layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer is not head
    }
    mixture = mixture_of(model, str(config.model_type))
    if mixture is not None:
        shapes = {name: shape for name, shape in shapes.items() if name not in mixture.aliases}
        shapes |= mixture.modules
    return dict(sorted(shapes.items())), vocabulary_of(config, model), _head_of(config), mixture


def _head_of(config: Any) -> Head | None:
    """Of a checkpoint that was saved as a classifier, as decoders of transformers have it."""
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return None
    return Head("score", int(config.get_text_config().hidden_size), int(config.num_labels))


def on_meta(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The model that ``config`` (of transformers) describes, on torch's meta device: shapes and no data.

    Raises whatever the model's own code does.
    """
    import torch
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        return build(copy.deepcopy(config), trust_remote_code=trust_remote_code)


def dtype_of(model_dir: Path) -> str | None:
    """The type in which vLLM serves the model and its adapters by default; None where that is another."""
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(model_dir, local_files_only=True).dtype
    # vLLM's "auto": what was saved as float32 is served in half of it.
    name = str(dtype).removeprefix("torch.")
    return "bfloat16" if name == "float32" else name if name in TORCH_DTYPES else None


def fingerprint(model_dir: Path) -> str | None:
    """64 hex digits that tell a model from its relatives of the same shape; None without safetensors.

    SHA-256 over the names and shapes of all weights, and over the first elements of the first, the middle
    and the last of them in bfloat16, so that a copy in float32 is the same model. Reads headers and a few kB.
    """
    import torch
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    files: dict[str, Path] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (it is not a dictionary)
                shapes[name], files[name] = weights.get_slice(name).get_shape(), path
    if not files:
        return None
    names = sorted(files)
    digest = hashlib.sha256("".join(f"{name} {shapes[name]}\n" for name in names).encode())
    for name in (names[0], names[len(names) // 2], names[-1]):
        with safe_open(files[name], framework="pt") as weights:
            if shapes[name]:
                first = weights.get_slice(name)[: 1 if len(shapes[name]) > 1 else _SAMPLE]
            else:  # a scalar, as a quantized checkpoint has for its scales: it cannot be sliced
                first = weights.get_tensor(name)
        values = first.flatten()[:_SAMPLE].to(torch.bfloat16)
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""A quantized checkpoint written out as an ordinary one: each weight as what its few bits mean.

The shards keep their names and the other tensors their bytes; what only a quantized layer has is left out.
One layer is in memory at a time. A change of a weight (an adapter's) is made in float32, before the one
rounding to the type that is written.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from adapters.files import sync_path
from adapters.inspection.base_model import on_meta
from adapters.inspection.quantized import (
    belongs_to_quantization,
    layer_of_tensor,
    quantization_of,
    quantized_layers,
    shape_of,
    weight_of,
)
from adapters.inspection.safetensors_header import DTYPES, ITEM_BYTES, TensorHeader, write_header
from adapters.inspection.tensor_stats import TORCH_DTYPES

INDEX_FILE = "model.safetensors.index.json"
# Said of the quantized weights alone; an engine would believe them.
_LEFT_OUT = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "recipe.yaml")
_TEXTS = (".json", ".txt", ".jinja", ".model", ".py")

# A layer's name and its weight in float32 -> the weight to be written.
Change = Callable[[str, torch.Tensor], torch.Tensor]


class Checkpoint(AbstractContextManager["Checkpoint"]):
    """The tensors of a base's folder by name. Raises OSError, and ValueError where there are none."""

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self.of: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            opened = self._stack.enter_context(safe_open(path, framework="pt"))
            for name in opened.keys():  # noqa: SIM118  (it is not a dictionary)
                self._files[name], self.of[name] = opened, path
        if not self.of:
            raise ValueError(f"{folder} holds no weights in safetensors")
        self.quantization = quantization_of(folder) or {}
        self.layers = quantized_layers(self.of)

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, name: str) -> torch.Tensor | None:
        return self._files[name].get_tensor(name) if name in self._files else None

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self._files[name].get_slice(name).get_shape()) if name in self._files else None

    def dtype(self, name: str) -> str:
        return str(self._files[name].get_slice(name).get_dtype())

    def weight(self, layer: str) -> torch.Tensor:
        """The weight of one of ``layers``, in float32."""
        return weight_of(lambda end: self.read(f"{layer}.{end}"), self.quantization)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of an ordinary checkpoint by name; those of ``layers`` in float32."""
        for layer in sorted(self.layers):
            yield f"{layer}.weight", self.weight(layer)
        for name in self.of:
            if not belongs_to_quantization(name, self.layers) and name not in self._replaced:
                tensor = self.read(name)
                assert tensor is not None
                yield name, tensor

    @property
    def _replaced(self) -> set[str]:
        return {f"{layer}.weight" for layer in self.layers}

    def shards(self) -> dict[str, list[str]]:
        """File -> the tensors of an ordinary checkpoint that it gets, in order of their names."""
        found: dict[str, list[str]] = {path.name: [] for path in sorted(set(self.of.values()))}
        for name, path in self.of.items():
            layer, end = layer_of_tensor(name)
            if layer in self.layers and end in ("weight", "weight_packed", "qweight"):
                found[path.name].append(f"{layer}.weight")
            elif not belongs_to_quantization(name, self.layers):
                found[path.name].append(name)
        return {file: sorted(names) for file, names in found.items() if names}

    def header(self, name: str, dtype: str) -> tuple[str, tuple[int, ...]]:
        """(type, shape) that the tensor ``name`` gets."""
        layer, end = layer_of_tensor(name)
        if layer in self.layers and end == "weight":
            return dtype, shape_of(
                lambda end: self.shape(f"{layer}.{end}"),
                lambda end: self.read(f"{layer}.{end}"),
                self.quantization,
            )
        stored = self.dtype(name)
        if stored not in DTYPES:
            raise ValueError(f"{name} is {stored}, which is written into no ordinary checkpoint")
        return DTYPES[stored][0], self.shape(name) or ()


def dequantize(base_dir: Path, out: Path, *, dtype: str = "bfloat16", change: Change | None = None) -> int:
    """Writes the quantized model in ``base_dir`` into the folder ``out``; returns how many layers it had.

    Raises FileExistsError where ``out`` is there, UnknownQuantization, ValueError where ``base_dir`` is not
    quantized, OSError. ``out`` appears complete or not at all.
    """
    out = out.absolute()
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} is there already; name a folder that is not")
    partial = out.with_name(f".{out.name}-{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        layers = write_into(partial, base_dir, dtype=dtype, change=change)
        for path in [*partial.iterdir(), partial]:
            sync_path(path)
        partial.rename(out)
        sync_path(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return layers


def write_into(folder: Path, base_dir: Path, *, dtype: str, change: Change | None = None) -> int:
    """As ``dequantize``, into an empty folder that exists already."""
    with Checkpoint(base_dir) as checkpoint:
        if not checkpoint.layers:
            raise ValueError(f"{base_dir} is not quantized")
        for path in sorted(base_dir.iterdir()):
            written = path.name in (*_LEFT_OUT, "config.json", INDEX_FILE)
            if path.is_file() and path.suffix in _TEXTS and not written:
                shutil.copyfile(path, folder / path.name)
        _write_config(base_dir, folder, dtype)
        total = 0
        weight_map: dict[str, str] = {}
        for file, names in checkpoint.shards().items():
            total += _write_shard(folder / file, names, checkpoint, dtype, change)
            weight_map |= dict.fromkeys(names, file)
        if len(set(weight_map.values())) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True))
        return len(checkpoint.layers)


def _write_config(base_dir: Path, folder: Path, dtype: str) -> None:
    config = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    for part in (config, config.get("text_config") or {}):
        part.pop("quantization_config", None)
        for name in ("dtype", "torch_dtype"):
            if name in part:
                part[name] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _write_shard(
    path: Path, names: list[str], checkpoint: Checkpoint, dtype: str, change: Change | None
) -> int:
    headers: dict[str, TensorHeader] = {}
    at = 0
    for name in names:
        kind, shape = checkpoint.header(name, dtype)
        header = TensorHeader(kind, shape, at, at)
        at += header.elements * ITEM_BYTES[kind]
        headers[name] = TensorHeader(kind, shape, header.begin, at)
    with path.open("xb") as file:
        write_header(file, headers)
        for name, header in headers.items():
            tensor = _tensor(name, checkpoint, change)
            if tuple(tensor.shape) != header.shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, and its shape says {header.shape}")
            rounded = tensor.to(TORCH_DTYPES[header.dtype])
            if change is not None and not rounded.isfinite().all():
                raise ValueError(f"{name} with the adapter is too large for {header.dtype}")
            file.write(rounded.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
    return at


def _tensor(name: str, checkpoint: Checkpoint, change: Change | None) -> torch.Tensor:
    layer, end = layer_of_tensor(name)
    if layer in checkpoint.layers and end == "weight":
        tensor = checkpoint.weight(layer)
    else:
        found = checkpoint.read(name)
        assert found is not None
        tensor = found
    if change is None or end != "weight" or tensor.ndim != 2:
        return tensor
    return change(layer, tensor)


def load(folder: Path) -> Any:
    """The model in ``folder`` in float32, for a comparison; a quantized one as what its few bits mean."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    options: dict[str, Any] = {"dtype": torch.float32}
    # transformers' usual way of attention leaves the soft caps of Gemma 2 out.
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        options["attn_implementation"] = "eager"
    quantization: Mapping[str, Any] | None = quantization_of(folder)
    if quantization is None:
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
    for part in {id(one): one for one in (config, config.get_text_config())}.values():
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    with Checkpoint(folder) as checkpoint:
        state = {name: tensor.float() for name, tensor in checkpoint.weights()}
    # AutoModel wants a path.
    kind: Any = type(on_meta(config))
    return kind.from_pretrained(None, config=config, state_dict=state, **options)

"""Files -> Manifest, or the reason why not: faithful or refused.

vLLM serves many a broken adapter without a word: a name that fits nowhere, a layer too many, a matrix too
small, a rank that differs from the config. Here each is refused with the offender's name, what was found
and what was expected. The order is from cheap to dear: the config, the header, then the values, one
tensor in memory at a time. Nothing is unpickled and no pattern of the upload is run as an expression.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from adapters.errors import AdapterRejected, fault
from adapters.model import CONFIG_FILE, WEIGHTS_FILE, BaseModel, Manifest
from adapters.peft_config import PeftConfig, read_config
from adapters.safetensors_header import TensorHeader, read_header
from adapters.strict_json import show

PREFIX = "base_model.model."
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Few enough that torch wakes no second thread: beside a busy engine the two wait for each other at every
# tensor, and 150 MiB took 12 s instead of half a second.
_SERIAL_ELEMENTS = 1 << 14

_LORA_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

# A part of a tensor's name -> (code, what such a tensor is). The first that occurs explains the refusal.
_FOREIGN = (
    ("lora_magnitude_vector", "dora_unsupported", "DoRA's magnitude"),
    (".lora_B.bias", "bias_unsupported", "a bias on lora_B"),
    (".modules_to_save", "modules_to_save_unsupported", "a fully trained layer"),
    (".trainable_tokens", "feature_unsupported", "a trained token embedding"),
    (".token_adapter", "feature_unsupported", "a trained token embedding"),
    (".lora_diag", "feature_unsupported", "KaSA's diagonal"),
    (".lora_embedding_", "tensor_unknown", "an adapter of an embedding"),
    (".base_layer", "tensor_unknown", "a weight of the base model"),
)


@dataclass(frozen=True, slots=True)
class _Pair:
    """One module's tensors by name: lora_A (rank, in_features) and lora_B (out_features, rank)."""

    a_name: str
    b_name: str
    a: TensorHeader
    b: TensorHeader

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def inspect(folder: Path, base: BaseModel, *, serving_dtype: str | None = None) -> Manifest:
    """The manifest of the adapter in ``folder``, if ``base`` serves it as PEFT would.

    ``serving_dtype`` is the type the engine casts adapters to (``float32``, ``float16``, ``bfloat16``); the
    values are judged after that cast, or in the file's own type without it. Synchronous: reads the whole
    weights file, so call it in a thread. Raises AdapterRejected, and OSError when the disk fails.
    """
    if serving_dtype is not None and serving_dtype not in DTYPES:
        raise ValueError(f"serving_dtype must be one of {', '.join(DTYPES)}, not {serving_dtype!r}")
    _refuse_pickles(folder)
    config = read_config(folder / CONFIG_FILE, base)
    pairs = _pair(read_header(folder / WEIGHTS_FILE), base)
    for module, pair in pairs.items():
        _check_shape(module, pair, base)
        _check_rank(module, pair, config)
    idle = _check_values(folder / WEIGHTS_FILE, pairs, config, serving_dtype)
    warnings = config.warnings(base, pairs)
    if idle:
        warnings.append(
            f"{len(idle)} of {len(pairs)} modules have a lora_A or lora_B of zeros, as {show(idle[0])}"
        )
    return Manifest(
        rank=max(pair.rank for pair in pairs.values()),
        alpha=config.lora_alpha,
        use_rslora=bool(config.use_rslora),
        dtype="+".join(sorted({tensor.dtype for pair in pairs.values() for tensor in (pair.a, pair.b)})),
        size_bytes=sum((folder / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE)),
        modules=tuple(sorted(pairs)),
        target_modules=tuple(sorted({_leaf(module) for module in pairs})),
        layers=tuple(sorted({layer for module in pairs if (layer := _layer(module)) is not None})),
        base_model=config.base_model_name_or_path or None,
        warnings=tuple(warnings),
    )


def _refuse(code: str, message: str) -> AdapterRejected:
    return fault(code, f"{WEIGHTS_FILE}: {message}", param=WEIGHTS_FILE)


def _refuse_pickles(folder: Path) -> None:
    for name in PICKLES:
        if (folder / name).exists():
            raise fault("weights_not_safetensors", f"The adapter holds {name}, a pickle.", param=name)


def _pair(tensors: Mapping[str, TensorHeader], base: BaseModel) -> dict[str, _Pair]:
    """Full module name -> its two tensors, sorted by name; every module is one of the base's."""
    sides: dict[str, dict[str, str]] = {}
    for name in sorted(tensors):
        module, side = _parse_name(name)
        _check_module(module, base)
        twin = sides.setdefault(module, {}).setdefault(side, name)
        if twin != name:
            raise _refuse("weights_invalid", f"{show(twin)} and {show(name)} are the same lora_{side}.")
    for module, named in sides.items():
        for side, other in (("A", "B"), ("B", "A")):
            if side not in named:
                raise _refuse(
                    "tensor_unpaired", f"{show(named[other])} has no lora_{side} beside it ({module})."
                )
    return {
        module: _Pair(named["A"], named["B"], tensors[named["A"]], tensors[named["B"]])
        for module, named in sides.items()
    }


def _parse_name(name: str) -> tuple[str, str]:
    """``base_model.model.<module>.lora_A.weight`` -> module, "A". vLLM reads it without the prefix too."""
    match = _LORA_NAME.fullmatch(name)
    if match is not None:
        return match["module"].removeprefix(PREFIX), match["side"]
    for part, code, what in _FOREIGN:
        if part in name:
            raise _refuse(code, f"tensor {show(name)} is {what}.")
    if "lora_" not in name and name.endswith((".weight", ".bias")):
        raise _refuse("modules_to_save_unsupported", f"tensor {show(name)} is a fully trained layer.")
    raise _refuse(
        "tensor_unknown", f"tensor {show(name)} is neither <module>.lora_A.weight nor .lora_B.weight."
    )


def _check_module(module: str, base: BaseModel) -> None:
    if module in base.modules:
        return
    for fused, parts in base.fused.items():
        if module == fused or module.endswith(f".{fused}"):
            raise _refuse("module_fused", f"{show(module)} is fused; {base.name} has {', '.join(parts)}.")
    raise _refuse("module_unknown", f"{base.name} has no module {show(module)}{_hint(module, base)}.")


def _hint(module: str, base: BaseModel) -> str:
    """What the base has instead: fewer layers, the same tail under another prefix, or other leaf names."""
    template, layer = _template(module), _layer(module)
    layers = sorted(
        found for name in base.modules if _template(name) == template and (found := _layer(name)) is not None
    )
    if layer is not None and layers:
        if layer > layers[-1]:
            return f": it has {layers[-1] + 1} layers"
        return f": of its layers only {show(layers)} have one"
    near = max(base.modules, key=lambda name: _common_tail(name, module), default=None)
    if near is not None and _common_tail(near, module) > 0:
        return f"; did you mean {show(near)}?"
    leaves = sorted({_leaf(name) for name in base.modules})
    close = get_close_matches(_leaf(module)[:128], leaves, n=1)
    return f"; did you mean {close[0]}?" if close else f"; it has {', '.join(leaves[:12])}"


def _check_shape(module: str, pair: _Pair, base: BaseModel) -> None:
    shape = base.modules[module]
    for name, tensor, fixed, size in (
        (pair.a_name, pair.a, 1, shape.in_features),
        (pair.b_name, pair.b, 0, shape.out_features),
    ):
        if len(tensor.shape) != 2:
            raise _refuse(
                "shape_mismatch",
                f"tensor {show(name)} has {len(tensor.shape)} dimensions, {tensor.shape}, not 2.",
            )
        if tensor.shape[fixed] != size:
            expected = f"(rank, {size})" if fixed else f"({size}, rank)"
            raise _refuse(
                "shape_mismatch", f"tensor {show(name)} is {tensor.shape}, and {base.name} needs {expected}."
            )


def _check_rank(module: str, pair: _Pair, config: PeftConfig) -> None:
    expected = config.rank_of(module)
    for name, rank in ((pair.a_name, pair.rank), (pair.b_name, pair.b.shape[1])):
        if rank != expected:
            raise _refuse(
                "rank_mismatch", f"tensor {show(name)} has rank {rank}, and the config says {expected}."
            )


def _check_values(
    path: Path, pairs: Mapping[str, _Pair], config: PeftConfig, serving_dtype: str | None
) -> list[str]:
    """The modules that do nothing. Refuses what is not finite as served, and adapters that do nothing at all.

    As vLLM does it: cast to the engine's type, then lora_B times the scaling in that type.
    """
    idle = []
    try:
        with safe_open(path, framework="pt") as file:
            for module, pair in pairs.items():
                scaling = config.scaling_of(module)
                acts = [
                    _is_active(name, file.get_tensor(name), factor, serving_dtype)
                    for name, factor in ((pair.a_name, 1.0), (pair.b_name, scaling))
                ]
                if not all(acts):
                    idle.append(module)
    except SafetensorError as error:
        raise _refuse("weights_invalid", f"safetensors cannot read it: {error}.") from None
    if len(idle) == len(pairs):
        raise _refuse(
            "adapter_no_effect", f"each of its {len(pairs)} modules has a lora_A or lora_B of zeros."
        )
    return idle


def _is_active(name: str, tensor: torch.Tensor, factor: float, serving_dtype: str | None) -> bool:
    """Whether any element is not zero as served; refuses NaN, infinity, and what the cast makes infinite.

    Casting and scaling (factor > 0) keep the order of numbers, so the smallest and the largest stand for all.
    """
    extremes = _extremes(tensor)
    if not extremes.isfinite().all():
        raise _refuse("weights_not_finite", f"tensor {show(name)} holds NaN or infinity.")
    dtype = DTYPES[serving_dtype] if serving_dtype else tensor.dtype
    served = extremes.to(dtype) * factor
    if not served.isfinite().all():
        raise _refuse(
            "weights_not_finite",
            f"tensor {show(name)} reaches {extremes.abs().max().item():.4g}, times the scaling {factor:.4g}"
            f" too large for {serving_dtype or dtype}, which ends at {torch.finfo(dtype).max:.4g}.",
        )
    return bool(served.any())


def _extremes(tensor: torch.Tensor) -> torch.Tensor:
    """(2,): the smallest and the largest element; NaN where there is one."""
    flat = tensor.flatten()
    parts = [flat[at : at + _SERIAL_ELEMENTS] for at in range(0, flat.numel(), _SERIAL_ELEMENTS)]
    return torch.stack(torch.stack([torch.stack(part.aminmax()) for part in parts]).aminmax())


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _layer(module: str) -> int | None:
    """The first number in the name: ``model.layers.3.mlp.experts.7.up_proj`` -> 3."""
    return next((int(part) for part in _numbers(module)), None)


def _template(module: str) -> str:
    """The name with its layer left open, so that the same module of every layer is equal."""
    layer = next(_numbers(module), None)
    return module if layer is None else module.replace(f".{layer}.", ".*.", 1)


def _numbers(module: str) -> Iterator[str]:
    return (part for part in module.split(".") if part.isdecimal() and part.isascii() and len(part) < 10)


def _common_tail(left: str, right: str) -> int:
    """How many dotted parts two names share at the end."""
    parts: Iterable[tuple[str, str]] = zip(
        reversed(left.split(".")), reversed(right.split(".")), strict=False
    )
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], parts))

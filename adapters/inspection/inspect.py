"""Files -> Manifest, or the reason why not: faithful or refused.

vLLM serves many a broken adapter without a word: a name that fits nowhere, a layer too many, a matrix too
small, a rank that differs from the config. Here each is refused with the offender's name, what was found
and what was expected. The order is from cheap to dear: the config, the header, then the values, one
tensor in memory at a time. Nothing is unpickled and no pattern of the upload is run as an expression.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from adapters.errors import AdapterRejected, fault
from adapters.inspection.dora import check_stored, without_doras
from adapters.inspection.experts import check_experts, per_expert
from adapters.inspection.heads import check_head, check_values, without_heads
from adapters.inspection.magnitude import implausible
from adapters.inspection.module_names import kind_of, layer_of, leaf, template
from adapters.inspection.peft_config import PeftConfig, check_base, check_unknown_fields, read_config
from adapters.inspection.pickles import PICKLES, ignored_pickles
from adapters.inspection.safetensors_header import TensorHeader, read_header
from adapters.inspection.strict_json import show
from adapters.inspection.tensor_stats import TORCH_DTYPES, extremes, one_thread, product_norm
from adapters.inspection.vocabulary import NAMES as VOCABULARY
from adapters.inspection.vocabulary import tensor_name
from adapters.model import (
    CONFIG_FILE,
    NOTHING_WAIVED,
    WEIGHTS_FILE,
    BaseModel,
    Coverage,
    Manifest,
    ModuleShape,
    Waivers,
)

PREFIX = "base_model.model."

_MISTRAL_FINETUNE = re.compile(r"(?:.+\.)?layers\.\d+\.(?:attention\.w[qkvo]|feed_forward\.w[123])")
_LORA_NAME = re.compile(r"(?P<module>.+)\.lora_(?:(?P<side>[AB])\.weight|embedding_(?P<table>[AB]))")

# A part of a tensor's name -> (code, what such a tensor is). The first that occurs explains the refusal.
_FOREIGN = (
    ("lora_magnitude_vector", "dora_unsupported", "DoRA's magnitude"),
    (".lora_B.bias", "bias_unsupported", "a bias on lora_B"),
    (".modules_to_save", "modules_to_save_unsupported", "a fully trained layer"),
    (".trainable_tokens", "feature_unsupported", "a trained token embedding"),
    (".token_adapter", "feature_unsupported", "a trained token embedding"),
    (".lora_diag", "feature_unsupported", "KaSA's diagonal"),
    (".lora.", "tensor_unknown", "an adapter as diffusers names it"),
    (".adapter.", "tensor_unknown", "an adapter as Megatron names it"),
    (".base_layer", "tensor_unknown", "a weight of the base model"),
)


@dataclass(frozen=True, slots=True)
class Pair:
    """One module's tensors by name: lora_A (rank, in_features) and lora_B (out_features, rank)."""

    a_name: str
    b_name: str
    a: TensorHeader
    b: TensorHeader

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Upload:
    """The config and the header of an adapter's two files, each read and validated once."""

    config: PeftConfig
    tensors: Mapping[str, TensorHeader]


def read_upload(folder: Path, base: BaseModel) -> Upload:
    """Reads the config and the header in ``folder``, and no tensor.

    Raises AdapterRejected for a config that ``base`` cannot serve and for a damaged file, OSError when the
    disk fails.
    """
    refuse_pickles(folder)
    return Upload(read_config(folder / CONFIG_FILE, base), read_header(folder / WEIGHTS_FILE))


def inspect(
    folder: Path,
    base: BaseModel,
    *,
    upload: Upload | None = None,
    serving_dtype: str | None = None,
    waived: Waivers = NOTHING_WAIVED,
) -> Manifest:
    """The manifest of the adapter in ``folder``, if ``base`` serves it as PEFT would.

    ``upload`` is what ``read_upload`` returned for the same folder, for a caller that has it already.
    ``serving_dtype`` is the type the engine casts adapters to (``float32``, ``float16``, ``bfloat16``); the
    values are judged after that cast, or in the file's own type without it. ``waived`` are checks that
    the upload does without.
    Synchronous: reads the whole weights file, so call it in a thread. Raises AdapterRejected, and OSError
    when the disk fails.
    """
    if serving_dtype is not None and serving_dtype not in TORCH_DTYPES:
        raise ValueError(f"serving_dtype must be one of {', '.join(TORCH_DTYPES)}, not {serving_dtype!r}")
    upload = upload or read_upload(folder, base)
    config = upload.config
    check_base(config, base)
    ignored = check_unknown_fields(config, waived.fields)
    pairs = check_tensors(upload.tensors, config, base)
    unknown = check_expressions(config, base, pairs)
    labels = check_head(upload.tensors, config.saves, base)
    with one_thread():
        norms, too_large = _sizes(folder / WEIGHTS_FILE, pairs, config, base, serving_dtype)
        check_values(folder / WEIGHTS_FILE, upload.tensors, base, serving_dtype)
    if too_large is not None and not waived.implausible:
        raise _refuse("adapter_implausible", f"{too_large}.")
    if not (waived.no_effect or labels or any(norms.values())):
        raise _refuse(
            "adapter_no_effect", f"in each of its {len(pairs)} modules lora_B times lora_A is zero."
        )
    warnings = [*config.warnings(base, pairs), *unknown]
    beside = [name for name in PICKLES if (folder / name).exists()]
    if beside:
        warnings.append(ignored_pickles(beside))
    if ignored:
        names = ", ".join(show(name) for name in ignored[:5])
        warnings.append(f"{CONFIG_FILE} has fields that the upload says do not matter: {names}")
    if too_large is not None:
        warnings.append(f"implausibly large, and accepted as the upload said: {too_large}")
    idle = [module for module, norm in norms.items() if norm == 0]
    if idle:
        warnings.append(
            f"{len(idle)} of {len(pairs)} modules do nothing, as lora_B times lora_A is zero: {show(idle[0])}"
        )
    return Manifest(
        rank=max(config.rank_of(module) for module in pairs),
        alpha=config.lora_alpha,
        use_rslora=bool(config.use_rslora),
        dtype="+".join(sorted({tensor.dtype for pair in pairs.values() for tensor in (pair.a, pair.b)})),
        size_bytes=sum((folder / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE)),
        modules=tuple(sorted(pairs)),
        target_modules=tuple(sorted({leaf(module) for module in pairs})),
        layers=tuple(sorted({layer for module in pairs if (layer := layer_of(module)) is not None})),
        base_model=config.base_model_name_or_path or None,
        coverage=_coverage(norms, config, base),
        warnings=tuple(warnings),
        implausible=too_large,
        ignored_fields=ignored,
        labels=labels,
    )


def check_tensors(
    tensors: Mapping[str, TensorHeader], config: PeftConfig, base: BaseModel
) -> dict[str, Pair]:
    """Full module name -> its two tensors, sorted; each fits its module of ``base`` and the config exactly.

    Raises AdapterRejected. Headers only: no value is looked at.
    """
    check_head(tensors, config.saves, base)
    others = without_heads(tensors, base)
    pairs = _pair(without_doras(others) if config.dora else others, base)
    if config.dora and (beyond := base.vocabulary.keys() & pairs.keys()):
        raise _refuse("dora_unsupported", f"DoRA is not computed on the vocabulary, {show(min(beyond))}.")
    for module, pair in pairs.items():
        _check_shape(module, pair, base)
        _check_rank(module, pair, config, _shape(module, base).experts)
    check_experts({module: pair.rank for module, pair in pairs.items()}, base)
    config.check_targets(base, pairs)
    return pairs


def check_expressions(config: PeftConfig, base: BaseModel, adapted: Collection[str]) -> list[str]:
    """As ``config.check_targets``, with what its expressions match, which are run; returns warnings.

    Rows of the vocabulary that were trained are pairs that no expression has named.
    """
    expressions = config.targets.expressions
    if not expressions:
        return []
    adapted = [module for module in adapted if module not in base.vocabulary]
    try:
        targets = config.targets.run({*base.modules, *adapted})
    except ValueError as exc:
        what = f"target_modules, exclude_modules or layers_pattern is no expression: {exc}."
        raise fault("target_mismatch", f"{CONFIG_FILE}: {what}", param=CONFIG_FILE) from exc
    config.check_targets(base, adapted, targets)
    return [
        f"its expression {show(text)} takes too long to run: the tensors are taken at their word"
        for how, text in expressions
        if (how, text) not in targets.ran
    ]


def check_fit(folder: Path, base: BaseModel, *, serving_dtype: str | None = None) -> None:
    """Raises AdapterRejected where ``base`` would not serve the adapter in ``folder`` as PEFT does.

    For one that was inspected before, perhaps for another engine: only what an engine decides is looked at.
    Reads the config and the header; with ``serving_dtype`` the values too, as that type may not hold them.
    Synchronous. Raises OSError when the disk fails.
    """
    upload = read_upload(folder, base)
    check_base(upload.config, base)
    pairs = check_tensors(upload.tensors, upload.config, base)
    if upload.config.dora:
        check_stored(folder / WEIGHTS_FILE, upload.tensors, base)
    if serving_dtype is not None:
        with one_thread():
            _sizes(folder / WEIGHTS_FILE, pairs, upload.config, base, serving_dtype)


def _coverage(norms: Mapping[str, float], config: PeftConfig, base: BaseModel) -> tuple[Coverage, ...]:
    available: dict[str, int] = defaultdict(int)
    for module in (*base.modules, *base.vocabulary):
        available[kind_of(module)] += 1
    kinds: dict[str, list[str]] = defaultdict(list)
    for module in norms:
        kinds[kind_of(module)].append(module)
    rows = []
    for kind, modules in sorted(kinds.items()):
        ranks = [config.rank_of(module) for module in modules]
        scalings = [config.scaling_of(module) for module in modules]
        sizes = [norms[module] for module in modules]
        in_layers = sorted((n, norms[module]) for module in modules if (n := layer_of(module)) is not None)
        rows.append(
            Coverage(
                module=kind,
                layers=tuple(n for n, _ in in_layers),
                available=available[kind],
                rank=(min(ranks), max(ranks)),
                scaling=(min(scalings), max(scalings)),
                norm=(min(sizes), max(sizes)),
                norms=tuple(norm for _, norm in in_layers),
            )
        )
    return tuple(rows)


def _refuse(code: str, message: str) -> AdapterRejected:
    return fault(code, f"{WEIGHTS_FILE}: {message}", param=WEIGHTS_FILE)


def refuse_pickles(folder: Path) -> None:
    """AdapterRejected (``weights_not_safetensors``) where pickles are all there is; beside safetensors they
    are not looked at."""
    for name in PICKLES:
        if (folder / name).exists() and not (folder / WEIGHTS_FILE).exists():
            raise fault("weights_not_safetensors", f"The adapter holds {name}, a pickle.", param=name)


def _pair(tensors: Mapping[str, TensorHeader], base: BaseModel) -> dict[str, Pair]:
    """Full module name -> its two tensors, sorted by name; every module is one of the base's."""
    sides: dict[str, dict[str, str]] = {}
    for name in sorted(tensors):
        module, side = parse_name(name)
        check_module(module, base)
        if not name.endswith(tensor_name(module, side)):
            raise _refuse("tensor_unknown", f"{show(name)}: PEFT names it {tensor_name(module, side)}.")
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
        module: Pair(named["A"], named["B"], tensors[named["A"]], tensors[named["B"]])
        for module, named in sides.items()
    }


def parse_name(name: str) -> tuple[str, str]:
    """``base_model.model.<module>.lora_A.weight`` -> module, "A". vLLM reads it without the prefix too."""
    match = _LORA_NAME.fullmatch(name)
    if match is not None:
        return match["module"].removeprefix(PREFIX), match["side"] or match["table"]
    for part, code, what in _FOREIGN:
        if part in name:
            raise _refuse(code, f"tensor {show(name)} is {what}.")
    if "lora_" not in name and name.endswith((".weight", ".bias")):
        raise _refuse("modules_to_save_unsupported", f"tensor {show(name)} is a fully trained layer.")
    raise _refuse(
        "tensor_unknown", f"tensor {show(name)} is neither <module>.lora_A.weight nor .lora_B.weight."
    )


def check_module(module: str, base: BaseModel) -> None:
    """Refuses a module that ``base`` does not have, with the nearest that it has."""
    if base.shape(module) is not None:
        return
    for fused, parts in base.fused.items():
        if module == fused or module.endswith(f".{fused}"):
            raise _refuse("module_fused", f"{show(module)} is fused; {base.name} has {', '.join(parts)}.")
    if leaf(module) in VOCABULARY:
        raise _refuse(
            "module_unknown",
            f"{show(module)} is the vocabulary's, which takes no adapters on {base.name}: vLLM serves them on"
            " some model classes only, and in one process. Train without it, or merge.",
        )
    _explain_foreign_names(module, base)
    raise _refuse("module_unknown", f"{base.name} has no module {show(module)}{_hint(module, base)}.")


def _explain_foreign_names(module: str, base: BaseModel) -> None:
    """Refuses names of which the tool or the model is known, with that as the reason."""
    if _MISTRAL_FINETUNE.fullmatch(module):
        raise _refuse(
            "tensor_unknown", f"{show(module)} is a module as mistral-finetune names it, and not PEFT."
        )
    parts = module.split(".")
    plain = ".".join(part for part in parts if part != "language_model")
    known = next((name for name in (plain, f"model.{plain}") if name in base.modules), None)
    if "language_model" in parts and known is not None:
        raise _refuse("module_prefixed", f"{base.name} has {show(known)}, and no {show(module)}.")


def _hint(module: str, base: BaseModel) -> str:
    """What the base has instead: fewer layers, the same tail under another prefix, or other leaf names."""
    same, layer = template(module), layer_of(module)
    layers = sorted(
        found for name in base.modules if template(name) == same and (found := layer_of(name)) is not None
    )
    if layer is not None and layers:
        if layer > layers[-1]:
            return f": it has {layers[-1] + 1} layers"
        return f": of its layers only {show(layers)} have one"
    near = max(base.modules, key=lambda name: _common_tail(name, module), default=None)
    if near is not None and _common_tail(near, module) > 0:
        return f"; did you mean {show(near)}?"
    leaves = sorted({leaf(name) for name in base.modules})
    close = get_close_matches(leaf(module)[:128], leaves, n=1)
    return f"; did you mean {close[0]}?" if close else f"; it has {', '.join(leaves[:12])}"


def _shape(module: str, base: BaseModel) -> ModuleShape:
    """Of a module that ``check_module`` has let pass."""
    shape = base.shape(module)
    assert shape is not None
    return shape


def _check_shape(module: str, pair: Pair, base: BaseModel) -> None:
    shape = _shape(module, base)
    for name, tensor in ((pair.a_name, pair.a), (pair.b_name, pair.b)):
        if 0 in tensor.shape:
            raise _refuse("tensor_empty", f"tensor {show(name)} has the shape {tensor.shape}: no numbers.")
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


def _check_rank(module: str, pair: Pair, config: PeftConfig, experts: int) -> None:
    expected = config.rank_of(module) * experts
    for name, rank in ((pair.a_name, pair.rank), (pair.b_name, pair.b.shape[1])):
        if rank != expected:
            raise _refuse(
                "rank_mismatch", f"tensor {show(name)} has rank {rank}, and the config says {expected}."
            )


def _sizes(
    path: Path, pairs: Mapping[str, Pair], config: PeftConfig, base: BaseModel, serving_dtype: str | None
) -> tuple[dict[str, float], str | None]:
    """Module -> Frobenius norm of what is added to its weight, as served; and why one of them is implausible.

    Refuses what is not finite as served. As vLLM does it: cast to the engine's type, then lora_B times the
    scaling in that type. At most one pair is in memory.
    """
    norms: dict[str, float] = {}
    why: str | None = None
    try:
        with safe_open(path, framework="pt") as file:
            for module, pair in pairs.items():
                a = _served(pair.a_name, file.get_tensor(pair.a_name), 1.0, serving_dtype)
                b = _served(
                    pair.b_name, file.get_tensor(pair.b_name), config.scaling_of(module), serving_dtype
                )
                shape = _shape(module, base)
                each = [(a, b)] if shape.experts == 1 else list(per_expert(a, b, shape.experts))
                of_each = [product_norm(*one) for one in each]
                norms[module] = math.hypot(*of_each)
                reasons = (implausible(*one, shape, norm) for one, norm in zip(each, of_each, strict=True))
                found = None if why else next(filter(None, reasons), None)
                if found is not None:
                    why = f"what it adds to {show(module)} {found}"
    except SafetensorError as error:
        raise _refuse("weights_invalid", f"safetensors cannot read it: {error}.") from None
    return norms, why


def _served(name: str, tensor: torch.Tensor, factor: float, serving_dtype: str | None) -> torch.Tensor:
    """``tensor`` as served; refuses NaN, infinity, and what the cast or the scaling makes infinite."""
    found = extremes(tensor)
    if not found.isfinite().all():
        raise _refuse("weights_not_finite", f"tensor {show(name)} holds NaN or infinity.")
    dtype = TORCH_DTYPES[serving_dtype] if serving_dtype else tensor.dtype
    # Casting and scaling (factor > 0) keep the order of numbers, so these two stand for all.
    if not (found.to(dtype) * factor).isfinite().all():
        raise _refuse(
            "weights_not_finite",
            f"tensor {show(name)} reaches {found.abs().max().item():.4g}, times the scaling {factor:.4g}"
            f" too large for {serving_dtype or dtype}, which ends at {torch.finfo(dtype).max:.4g}.",
        )
    return tensor.to(dtype) * factor


def _common_tail(left: str, right: str) -> int:
    """How many dotted parts two names share at the end."""
    parts: Iterable[tuple[str, str]] = zip(
        reversed(left.split(".")), reversed(right.split(".")), strict=False
    )
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], parts))

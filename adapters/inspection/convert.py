"""Uploads that say what we could serve in a form that vLLM would refuse or lose, rewritten into PEFT's.

    names      wrappers of torch (FSDP, compile, DDP, checkpointing), the adapter's name inside a tensor's
               (``lora_A.default.weight``), a bare backbone without its ``model.``, the names of another
               release of transformers or of a text model by itself; what VeLoRA saves for training alone is
               left out
    fused      ``qkv_proj`` of a model whose checkpoint has ``q_proj``, ``k_proj``, ``v_proj``: each part gets
               all of lora_A and its own rows of lora_B
    initial    PiSSA, OLoRA, CorDA and LoRA-GA change the base weights before training. With the weights from
               before, A0 and B0: W + BA - B0A0 = W + [B | -B0] [A ; A0], a plain LoRA of twice the rank
               (``subtract_mutated_init`` in ``peft/tuners/lora/model.py``)

What is to be done is decided on names and shapes alone, and checked as every upload is, before a byte is
written. Writing holds one tensor of the result in memory.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from safetensors import SafetensorError, safe_open

from adapters.errors import AdapterRejected, fault
from adapters.inspection.converted_config import (
    of_twice_the_rank,
    with_exact_targets,
    with_patterns_of_parts,
    with_renamed_keys,
    without_init,
)
from adapters.inspection.dora import MAGNITUDE, without_doras
from adapters.inspection.experts import is_stacked, of_modules, parameter_of, with_literal_patterns
from adapters.inspection.heads import heads_of, without_heads
from adapters.inspection.inspect import (
    PREFIX,
    Upload,
    check_expressions,
    check_module,
    check_tensors,
    parse_name,
    refuse_pickles,
)
from adapters.inspection.module_names import kind_of, leaf
from adapters.inspection.peft_config import PeftConfig, load_fields, parse_config
from adapters.inspection.safetensors_header import ITEM_BYTES, TensorHeader, read_header, write_header
from adapters.inspection.strict_json import show
from adapters.inspection.tensor_stats import TORCH_DTYPES
from adapters.inspection.vocabulary import check_left_out, is_embedding, tensor_name, whole_layer
from adapters.model import CONFIG_FILE, INITIAL_FILE, WEIGHTS_FILE, BaseModel

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# VeLoRA compresses what a training step keeps for its gradients, with a projection that PEFT saves too.
_TRAINING_ONLY = re.compile(r".+\.lora_velora_embed(?:\.[^.]+)?")
_NAMED = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_TABLE = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?")

_LITERAL = "keys of the patterns that PEFT wrote as expressions became the names that they stand for"

_MAGNITUDE = re.compile(rf"(?P<module>.+){re.escape(MAGNITUDE)}(?:\.[^.]+)?(?:\.weight)?")

# (full module name, "A" or "B")
Side = tuple[str, str]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of one tensor of the upload; all of them if ``rows`` is None."""

    file: str
    name: str
    rows: tuple[int, int] | None = None
    negated: bool = False


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the result: ``pieces`` one after the other along ``dim``, or zeros."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[_Piece, ...]
    dim: int = 0


@dataclass(frozen=True, slots=True)
class Conversion:
    """What will be written, and ``notes`` for the report: one sentence for each thing that changes."""

    fields: Mapping[str, Any]
    tensors: Mapping[Side, _Tensor]
    notes: tuple[str, ...]
    base: BaseModel
    # The base's own layers in the file, which PEFT reads over the base's.
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # A classifier's own head, by the names of its tensors, copied as it is.
    heads: Mapping[str, TensorHeader] = dataclasses.field(default_factory=dict)
    # DoRA's, by the names that PEFT gives them.
    magnitudes: Mapping[str, _Tensor] = dataclasses.field(default_factory=dict)

    def write(self, source: Path, target: Path) -> None:
        """Both files in ``target``, on disk and complete under their names; ``target`` may be ``source``.

        Raises AdapterRejected where safetensors cannot read the upload, OSError where the disk fails.
        """
        if self.left_out:
            check_left_out(source / WEIGHTS_FILE, self.left_out, self.base)
        config = json.dumps(self.fields, indent=2).encode()
        with ExitStack() as stack:
            parts = {name: stack.enter_context(_Part(target / name)) for name in (CONFIG_FILE, WEIGHTS_FILE)}
            parts[CONFIG_FILE].file.write(config)
            self._write_weights(source, parts[WEIGHTS_FILE].file)
            for part in parts.values():
                part.keep()
        if source == target:
            (source / INITIAL_FILE).unlink(missing_ok=True)

    def headers(self) -> dict[str, TensorHeader]:
        """The tensors of the result by name, in the order of their bytes."""
        headers, at = {}, 0
        for (module, side), tensor in sorted(self.tensors.items()):
            size = tensor.shape[0] * tensor.shape[1] * ITEM_BYTES[tensor.dtype]
            headers[f"{PREFIX}{tensor_name(module, side)}"] = TensorHeader(
                tensor.dtype, tensor.shape, at, at + size
            )
            at += size
        for name, vector in sorted(self.magnitudes.items()):
            size = math.prod(vector.shape) * ITEM_BYTES[vector.dtype]
            headers[name] = TensorHeader(vector.dtype, vector.shape, at, at + size)
            at += size
        for name, head in sorted(self.heads.items()):
            size = head.elements * ITEM_BYTES[head.dtype]
            headers[name] = TensorHeader(head.dtype, head.shape, at, at + size)
            at += size
        return headers

    def _write_weights(self, source: Path, file: BinaryIO) -> None:
        write_header(file, self.headers())
        files = {piece.file for tensor in self.tensors.values() for piece in tensor.pieces}
        try:
            with ExitStack() as stack:
                opened = {
                    name: stack.enter_context(safe_open(source / name, framework="pt")) for name in files
                }
                for side in sorted(self.tensors):
                    file.write(_bytes_of(_build(self.tensors[side], opened)))
                for name in sorted(self.magnitudes):
                    file.write(_bytes_of(_build(self.magnitudes[name], opened)))
                for name in sorted(self.heads):
                    file.write(_bytes_of(opened[WEIGHTS_FILE].get_tensor(name)))
        except SafetensorError as error:
            raise _refuse("weights_invalid", f"safetensors cannot read it: {error}.") from None


def plan(folder: Path, base: BaseModel) -> Conversion | Upload:
    """What must be rewritten so that ``base`` serves ``folder``; the Upload as read where nothing must be.

    Reads the config and the headers, and no tensor. Raises AdapterRejected for what no conversion helps.
    """
    refuse_pickles(folder)
    given = load_fields(folder / CONFIG_FILE)
    fields = with_literal_patterns(given)
    rewritten = [_LITERAL] if fields != given else []
    initial: _Named | None = None
    if (folder / INITIAL_FILE).exists():
        fields = without_init(fields)
        initial = _named(INITIAL_FILE, read_header(folder / INITIAL_FILE), base)
    config = parse_config(fields, base)
    headers = read_header(folder / WEIGHTS_FILE)
    heads = heads_of(headers, base)
    others = without_heads(headers, base)
    if config.dora:
        others = {name: x for name, x in without_doras(others).items() if not _MAGNITUDE.fullmatch(name)}
    upload = _with_whole_experts(_named(WEIGHTS_FILE, others, base), config, base)
    parts = {module: parts for module, _ in upload.tensors if (parts := _parts(module, base))}
    zeros = {module for (module, _), tensor in upload.tensors.items() if not tensor.pieces}
    modules = {module for module, _ in upload.tensors} - zeros
    trained = {module: upload.trained_as.get(module, module) for module in modules}
    weights = [name for name in trained.values() if not is_stacked(name) and config.targets_weight(name)]
    if weights:
        rewritten.append(
            f"weights adapted as parameters became layers: {', '.join(sorted(set(map(kind_of, weights))))}"
        )
    if initial is None and not parts and not upload.notes and not rewritten:
        return Upload(config, headers)
    if config.dora and initial is not None:
        raise _refuse("dora_unsupported", "no initial weights are subtracted from a DoRA.")
    config.check_targets(base, set(trained.values()))
    rewritten += check_expressions(config, base, set(trained.values()))
    tensors, notes, twice = upload.tensors, [*upload.notes, *rewritten], 1
    if initial is not None:
        tensors, twice = _subtract(tensors, initial.tensors), 2
        fields = of_twice_the_rank(fields, config)
        notes.append("its initial weights were subtracted: a plain LoRA of twice the rank")
    if parts:
        tensors = _split(tensors, parts, base)
        fields = with_patterns_of_parts(fields, config, parts)
        for fused in sorted({leaf(module) for module in parts}):
            notes.append(f"{fused} was split into {', '.join(base.fused[fused])}, rows in this order")
    if weights:
        fields = of_modules(fields, [parameter_of(name) for name in weights])
    if upload.trained_as:
        fields = with_renamed_keys(fields, {old: new for new, old in upload.trained_as.items()})
    if parts or upload.trained_as or weights or zeros:
        fields = with_exact_targets(fields, {module for module, _ in tensors})
    magnitudes = _magnitudes(headers, parts, base) if config.dora else {}
    conversion = Conversion(fields, tensors, tuple(notes), base, upload.left_out, heads, magnitudes)
    converted = parse_config(fields, base)
    check_tensors(conversion.headers(), converted, base)
    for module in modules:
        for part in parts.get(module, (module,)):
            _check_same(config, trained[module], converted, part, twice)
    return conversion


def _refuse(code: str, message: str, file: str = WEIGHTS_FILE) -> AdapterRejected:
    return fault(code, f"{file}: {message}", param=file)


# --- names ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Named:
    """The tensors of one file under the names of the base's modules (a fused one under its own).

    ``trained_as`` holds the names that the modules had in training, where they were others.
    """

    tensors: Mapping[Side, _Tensor]
    trained_as: Mapping[str, str]
    notes: tuple[str, ...]
    left_out: Mapping[str, str]


def _named(file: str, headers: Mapping[str, TensorHeader], base: BaseModel) -> _Named:
    """``headers`` of ``file`` by the base's names. Raises AdapterRejected for a tensor that is not a LoRA's,
    and for two that get the same name."""
    tensors: dict[Side, _Tensor] = {}
    trained_as: dict[str, str] = {}
    wrappers: set[str] = set()
    adapters: set[str] = set()
    left_out = {name for name in headers if _TRAINING_ONLY.fullmatch(name)}
    whole = {name: layer for name in headers if (layer := whole_layer(_unwrapped(name)[0], base)) is not None}
    for name, header in sorted(headers.items()):
        if name in left_out or name in whole:
            continue
        found = _NAMED.fullmatch(name)
        if found is None or is_embedding(found["module"]):
            found = _table(name)
        trained, wrapped = _unwrapped(found["module"])
        module = _rooted(trained, base)
        if not _parts(module, base):
            check_module(module, base)
        if module != trained:
            trained_as[module] = trained
        wrappers |= wrapped
        adapters.add(found["adapter"] or "")
        side = (module, found["side"])
        if side in tensors:
            twin = tensors[side].pieces[0].name
            raise _refuse("weights_invalid", f"{show(twin)} and {show(name)} are the same tensor.", file)
        tensors[side] = _Tensor(header.dtype, header.shape, (_Piece(file, name),))
    if len(adapters) > 1:
        raise _refuse(
            "tensor_unknown", f"it holds tensors of {len(adapters)} adapters, {show(sorted(adapters))}.", file
        )
    notes = []
    if left_out:
        notes.append(f"VeLoRA's projections, which a training uses alone, were left out: {len(left_out)}")
    if whole:
        layers = ", ".join(sorted(set(whole.values())))
        notes.append(f"PEFT's copy of the base's own layer was left out, as it is the same: {layers}")
    if wrappers:
        notes.append(f"torch's wrappers were taken out of the tensors' names: {', '.join(sorted(wrappers))}")
    if adapters != {""}:
        notes.append(f"the adapter's name was taken out of the tensors' names: {show(adapters.pop())}")
    if any(module == f"model.{trained}" for module, trained in trained_as.items()):
        notes.append("'model.' was put before the names of a bare backbone's modules")
    other = next((both for both in trained_as.items() if both[0] != f"model.{both[1]}"), None)
    if other is not None:
        notes.append(f"modules were renamed as the served checkpoint has them, {other[1]} to {other[0]}")
    return _Named(tensors, trained_as, tuple(notes), whole)


def _with_whole_experts(upload: _Named, config: PeftConfig, base: BaseModel) -> _Named:
    """``upload`` with zeros for the projection of stacked experts that was not adapted beside the other.

    PEFT calls the pair of either alone ``…experts``; the config says which it is.
    """
    tensors, trained_as = dict(upload.tensors), dict(upload.trained_as)
    for down in sorted({module for module, _ in tensors if f"{module}.base_layer" in base.modules}):
        gate_up, trained = f"{down}.base_layer", trained_as.get(down, down)
        adapted = [config.targets_weight(name) for name in (trained, f"{trained}.base_layer")]
        if (gate_up, "A") in tensors or sum(adapted) != 1:
            continue
        if adapted[1]:
            tensors |= {
                (gate_up, side): tensors.pop((down, side)) for side in "AB" if (down, side) in tensors
            }
            if trained_as.pop(down, None) is not None:
                trained_as[gate_up] = f"{trained}.base_layer"
        missing = down if adapted[1] else gate_up
        shape, dtype = base.modules[missing], next(iter(tensors.values())).dtype
        rank = config.rank_of(missing) * shape.experts
        tensors[missing, "A"] = _Tensor(dtype, (rank, shape.in_features), ())
        tensors[missing, "B"] = _Tensor(dtype, (shape.out_features, rank), ())
    if tensors == upload.tensors:
        return upload
    note = "one projection of the experts was not adapted, and got a pair of zeros"
    return replace(upload, tensors=tensors, trained_as=trained_as, notes=(*upload.notes, note))


def _table(name: str) -> re.Match[str]:
    """The parts of a tensor's name that is an embedding's; AdapterRejected where it is none."""
    found = _TABLE.fullmatch(name)
    if found is not None and is_embedding(found["module"]):
        return found
    module, side = parse_name(name)
    raise _refuse("tensor_unknown", f"{show(name)}: PEFT names it {show(tensor_name(module, side))}.")


def _unwrapped(name: str) -> tuple[str, set[str]]:
    """A module's name without PEFT's prefix and torch's wrappers, and which of these there were."""
    parts = name.split(".")
    wrappers = _WRAPPERS.intersection(parts)
    parts = [part for part in parts if part not in _WRAPPERS]
    if parts[:1] == ["module"]:
        parts, wrappers = parts[1:], wrappers | {"module"}
    return ".".join(parts).removeprefix(PREFIX), set(wrappers)


def _rooted(module: str, base: BaseModel) -> str:
    """The base's name for a module that has another where it was trained.

    PEFT on a backbone alone (``AutoModel``) knows its modules without the ``model.`` in front.
    """
    for name in (module, f"model.{module}"):
        if base.shape(name) is not None or _parts(name, base):
            return name
        if name in base.aliases:
            return base.aliases[name]
        parent, _, last = name.rpartition(".")
        parts = [base.aliases.get(f"{parent}.{part}") for part in base.fused.get(last, ())]
        if parts and parts[0] is not None and None not in parts:
            return f"{parts[0].rpartition('.')[0]}.{last}"
    return module


def _parts(module: str, base: BaseModel) -> tuple[str, ...]:
    """The modules that the base has instead of a fused one; empty where it is not, or not all are there."""
    if module in base.modules:
        return ()
    parent, _, last = module.rpartition(".")
    parts = tuple(f"{parent}.{part}" for part in base.fused.get(last, ()))
    return parts if all(part in base.modules for part in parts) else ()


# --- tensors --------------------------------------------------------------------------------------------


def _split(
    tensors: Mapping[Side, _Tensor], parts: Mapping[str, tuple[str, ...]], base: BaseModel
) -> dict[Side, _Tensor]:
    split: dict[Side, _Tensor] = {}
    for (module, side), tensor in tensors.items():
        begin = 0
        for part in parts.get(module, ()):
            made = tensor
            if side == "B":
                end = begin + base.modules[part].out_features
                made, begin = _rows(tensor, begin, end), end
            if (part, side) in split or (part, side) in tensors:
                raise _refuse("weights_invalid", f"{show(module)} and {show(part)} are the same layer.")
            split[part, side] = made
        if module not in parts:
            split[module, side] = tensor
        elif side == "B" and tensor.shape[:1] != (begin,):
            raise _refuse(
                "shape_mismatch",
                f"tensor {show(tensor.pieces[0].name)} is {tensor.shape}, and {base.name} needs"
                f" ({begin}, rank) for {', '.join(map(leaf, parts[module]))} together.",
            )
    return split


def _rows(tensor: _Tensor, begin: int, end: int) -> _Tensor:
    """Rows ``begin`` to ``end`` of a lora_B, whose pieces lie side by side."""
    pieces = tuple(replace(piece, rows=(begin, end)) for piece in tensor.pieces)
    return replace(tensor, shape=(end - begin, *tensor.shape[1:]), pieces=pieces)


def _magnitudes(
    headers: Mapping[str, TensorHeader], parts: Mapping[str, tuple[str, ...]], base: BaseModel
) -> dict[str, _Tensor]:
    """DoRA's magnitudes under PEFT's names; those of a fused layer are cut as the rows of its lora_B are."""
    found: dict[str, _Tensor] = {}
    for name, header in sorted(headers.items()):
        match = _MAGNITUDE.fullmatch(name)
        if match is None:
            continue
        module, begin = _rooted(_unwrapped(match["module"])[0], base), 0
        for part in parts.get(module, (module,)):
            made = _Tensor(header.dtype, header.shape, (_Piece(WEIGHTS_FILE, name),))
            if module in parts:
                end = begin + base.modules[part].out_features
                made, begin = _rows(made, begin, end), end
            if found.setdefault(f"{PREFIX}{part}{MAGNITUDE}", made) is not made:
                raise _refuse("weights_invalid", f"{show(name)}: {show(part)} has two magnitudes.")
        if module in parts and header.shape != (begin,):
            raise _refuse("shape_mismatch", f"tensor {show(name)} is {header.shape}, not ({begin},).")
    return found


def _subtract(trained: Mapping[Side, _Tensor], initial: Mapping[Side, _Tensor]) -> dict[Side, _Tensor]:
    """[A ; A0] and [B | -B0] for every pair; both files have the same tensors in the same shapes."""
    if trained.keys() != initial.keys():
        module, side = sorted(trained.keys() ^ initial.keys())[0]
        raise _refuse("tensor_unpaired", f"{show(module)} has a lora_{side} in one file only.", INITIAL_FILE)
    joined = {}
    for (module, side), tensor in trained.items():
        if is_stacked(module):
            raise _refuse("init_unsupported", f"{show(module)} holds experts together.", INITIAL_FILE)
        before = initial[module, side]
        if before.shape != tensor.shape or len(tensor.shape) != 2:
            raise _refuse(
                "shape_mismatch",
                f"lora_{side} of {show(module)} is {before.shape}, and {tensor.shape} in {WEIGHTS_FILE}.",
                INITIAL_FILE,
            )
        rows, columns = tensor.shape
        joined[module, side] = _Tensor(
            tensor.dtype if tensor.dtype == before.dtype else "float32",
            (rows * 2, columns) if side == "A" else (rows, columns * 2),
            (*tensor.pieces, *(replace(piece, negated=side == "B") for piece in before.pieces)),
            dim=0 if side == "A" else 1,
        )
    return joined


def _build(tensor: _Tensor, files: Mapping[str, Any]) -> torch.Tensor:
    if not tensor.pieces:
        return torch.zeros(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype])
    pieces = []
    for piece in tensor.pieces:
        if piece.rows is None:
            part = files[piece.file].get_tensor(piece.name)
        else:
            part = files[piece.file].get_slice(piece.name)[slice(*piece.rows)]
        part = part.to(TORCH_DTYPES[tensor.dtype])
        pieces.append(-part if piece.negated else part)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, tensor.dim)


def _bytes_of(tensor: torch.Tensor) -> Any:
    """A buffer of its bytes, row after row."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def _check_same(config: PeftConfig, module: str, converted: PeftConfig, part: str, twice: int) -> None:
    """Patterns are matched by name, and names have changed: no part may have got another's rank or alpha."""
    same_rank = converted.rank_of(part) == config.rank_of(module) * twice
    if not same_rank or not math.isclose(converted.scaling_of(part), config.scaling_of(module)):
        raise _refuse(
            "module_fused", f"the patterns give {show(module)} another rank or alpha than {show(part)}."
        )


# --- files ----------------------------------------------------------------------------------------------


class _Part:
    """A file that appears under its name when ``keep`` is called, and never in part."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(f".{path.name}.part")

    def __enter__(self) -> Self:
        self.file: BinaryIO = self._partial.open("xb")
        return self

    def keep(self) -> None:
        self.file.flush()
        os.fchmod(self.file.fileno(), 0o444)
        os.fsync(self.file.fileno())
        self._partial.rename(self.path)

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self._partial.unlink(missing_ok=True)

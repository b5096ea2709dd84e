"""Rows of the vocabulary that were trained whole, as a pair of lora_A and lora_B: exact, and a rank a row.

PEFT's ``trainable_token_indices`` puts rows of the adapter's own in the place of the base's, and a fully
trained ``embed_tokens`` or ``lm_head`` (``modules_to_save``) that differs from the base's in a few rows does
the same. With D the difference to the base's rows and E the rows of the identity that they are in:

    embed_tokens    A = E  (rows, tokens)     B = Dᵀ  (width, rows)
    lm_head         A = D  (rows, width)      B = Eᵀ  (tokens, rows)      both at a scaling of 1

Where the base's two layers are one, PEFT puts trained rows into both, and a layer trained whole into itself.
What is written is an adapter as PEFT saves it, for every other check to look at. What has more rows than the
largest rank, or tokens that the base does not have, is left as it is, and refused by those.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from adapters.errors import AdapterRejected, fault
from adapters.inspection.dora import Checkpoint
from adapters.inspection.module_names import leaf, suffixes
from adapters.inspection.peft_config import load_fields
from adapters.inspection.rewritten import write_beside
from adapters.inspection.safetensors_header import TensorHeader, read_header
from adapters.inspection.strict_json import show
from adapters.inspection.vocabulary import EMBEDDING, HEAD, is_embedding, tensor_name
from adapters.model import CONFIG_FILE, INITIAL_FILE, WEIGHTS_FILE, BaseModel

PREFIX = "base_model.model."
_DELTA = ".token_adapter.trainable_tokens_delta"
_LITERAL = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class _Rows:
    """``rows`` of the layer ``module`` are those of the tensor ``name``; of all of it where that is whole."""

    module: str
    name: str
    rows: tuple[int, ...]
    whole: bool


def rewrite(folder: Path, base: BaseModel, into: Path) -> tuple[str, ...]:
    """Writes both files of the adapter in ``folder`` into ``into`` with its trained rows as pairs.

    Returns what was done, for the report; nothing, and nothing is written, where the adapter has no such
    rows, or where they cannot be served. Reads a whole layer of the vocabulary if the adapter has one.
    Raises AdapterRejected for rows that are damaged or that ``base`` does not have, OSError.
    """
    if not (folder / WEIGHTS_FILE).exists() or (folder / INITIAL_FILE).exists() or not base.vocabulary:
        return ()
    fields = load_fields(folder / CONFIG_FILE)
    if fields.get("ensure_weight_tying") or fields.get("use_dora"):
        return ()
    if not (fields.get("trainable_token_indices") or fields.get("modules_to_save")):
        return ()
    headers = read_header(folder / WEIGHTS_FILE)
    try:
        with Checkpoint(base) as checkpoint, safe_open(folder / WEIGHTS_FILE, framework="pt") as weights:
            found = _trained(fields, headers, weights, base, checkpoint)
            if not found:
                return ()
            pairs = {one.module: _pair(one, weights, base, checkpoint) for one in found if one.rows}
    except SafetensorError as error:
        raise fault("weights_invalid", f"{WEIGHTS_FILE}: safetensors cannot read it: {error}.") from None
    left = {one.name for one in found}
    added = {
        f"{PREFIX}{tensor_name(module, side)}": tensor
        for module, pair in pairs.items()
        for side, tensor in zip("AB", pair, strict=True)
    }
    kept = {name: header for name, header in headers.items() if name not in left}
    config = json.dumps(_fields(fields, found), indent=2).encode()
    write_beside(folder / WEIGHTS_FILE, kept, added, into / WEIGHTS_FILE)
    _replace(into / CONFIG_FILE, config)
    return tuple(
        f"{len(one.rows)} rows of {one.module} that were trained whole became a pair of this rank"
        if one.rows
        else f"{one.module}, saved whole, was left out: it is the base's own"
        for one in found
    )


def _trained(
    fields: Mapping[str, Any],
    headers: Mapping[str, TensorHeader],
    weights: Any,
    base: BaseModel,
    checkpoint: Checkpoint,
) -> list[_Rows]:
    """None of them where one cannot be served: then the upload is refused as it is."""
    wanted = fields.get("trainable_token_indices")
    saved = fields.get("modules_to_save")
    if wanted and saved:
        return []
    if wanted:
        found = _indexed(wanted, headers, base, checkpoint)
    else:
        found = _whole(saved, headers, weights, base, checkpoint)
    most = base.max_lora_rank
    if any(len(one.rows) > most for one in found):
        rows = max(len(one.rows) for one in found)
        code = "feature_unsupported" if wanted else "modules_to_save_unsupported"
        raise _refuse(code, f"{rows} rows of the vocabulary were trained, and at most {most} are served.")
    return found


def _indexed(
    wanted: Any, headers: Mapping[str, TensorHeader], base: BaseModel, checkpoint: Checkpoint
) -> list[_Rows]:
    """Of ``trainable_token_indices``: a list of the embedding's, or one for each layer by its name."""
    layers = wanted if isinstance(wanted, dict) else {EMBEDDING: wanted}
    found: list[_Rows] = []
    for layer, indices in layers.items():
        module = next((name for name in base.vocabulary if layer in suffixes(name)), None)
        if module is None:
            return []
        rows = _checked(indices, module, base)
        name = f"{PREFIX}{module}{_DELTA}"
        if name in headers:
            found.append(_Rows(module, name, rows, whole=False))
    embedding = next((one for one in found if is_embedding(one.module)), None)
    head = next((name for name in base.vocabulary if leaf(name) == HEAD), None)
    tied = head is not None and not checkpoint.has(head)
    if tied and embedding is not None and all(one is embedding for one in found):
        assert head is not None
        found.append(_Rows(head, embedding.name, embedding.rows, whole=False))
    for one in found:
        shape = headers[one.name].shape
        width = checkpoint.shape(_source(one.module, base, checkpoint))[1]
        if shape != (len(one.rows), width):
            raise _refuse(
                "shape_mismatch", f"tensor {show(one.name)} is {shape}, not ({len(one.rows)}, {width})."
            )
    return found


def _checked(indices: Any, module: str, base: BaseModel) -> tuple[int, ...]:
    whole = isinstance(indices, list) and all(type(one) is int for one in indices)
    if not whole or len(set(indices)) != len(indices) or min(indices, default=0) < 0:
        raise fault(
            "config_invalid",
            f"{CONFIG_FILE}: trainable_token_indices must be different ids of tokens.",
            param=CONFIG_FILE,
        )
    shape = base.vocabulary[module]
    tokens = shape.in_features if is_embedding(module) else shape.out_features
    if indices and max(indices) >= tokens:
        raise _refuse(
            "feature_unsupported",
            f"row {max(indices)} of {show(module)} was trained, and {base.name} has {tokens} rows: the"
            " embedding was resized.",
        )
    return tuple(indices)


def _whole(
    saved: Any, headers: Mapping[str, TensorHeader], weights: Any, base: BaseModel, checkpoint: Checkpoint
) -> list[_Rows]:
    """Of ``modules_to_save``, where it names layers of the vocabulary and nothing else."""
    if not isinstance(saved, list):
        return []
    found = []
    for layer in saved:
        module = next((name for name in base.vocabulary if layer in suffixes(name)), None)
        name = f"{PREFIX}{module}.weight"
        if module is None or name not in headers or len(headers[name].shape) != 2:
            return []
        source = _source(module, base, checkpoint)
        if weights.get_slice(name).get_shape() != checkpoint.shape(source):
            return []  # resized: refused as it is
        found.append(_Rows(module, name, _differing(name, weights, source, checkpoint), whole=True))
    return found


def _differing(name: str, weights: Any, source: str, checkpoint: Checkpoint) -> tuple[int, ...]:
    """The rows of the tensor ``name`` that are not the base's, in the narrower of the two types."""
    given = weights.get_slice(name)
    rows: list[int] = []
    for at, block in checkpoint.rows(source):
        part = given[at : at + len(block)]
        narrow = min((part.dtype, checkpoint.dtype(source)), key=lambda dtype: dtype.itemsize)
        differs = (part.to(narrow) != block.to(narrow)).any(1)
        rows += (differs.nonzero().flatten() + at).tolist()
    return tuple(rows)


def _source(module: str, base: BaseModel, checkpoint: Checkpoint) -> str:
    """Where the base's weight of ``module`` is: the embedding has that of a head which is tied to it."""
    if checkpoint.has(module):
        return module
    return next((other for other in base.vocabulary if is_embedding(other)), module)


def _pair(
    one: _Rows, weights: Any, base: BaseModel, checkpoint: Checkpoint
) -> tuple[torch.Tensor, torch.Tensor]:
    given = weights.get_slice(one.name)
    rows = [given[row : row + 1] for row in one.rows] if one.whole else [given[:]]
    trained = torch.cat(rows).float()
    if not trained.isfinite().all():
        raise _refuse("weights_not_finite", f"tensor {show(one.name)} holds NaN or infinity.")
    difference = trained - checkpoint.picked(_source(one.module, base, checkpoint), one.rows)
    shape = base.vocabulary[one.module]
    tokens = shape.in_features if is_embedding(one.module) else shape.out_features
    selector = torch.zeros(len(one.rows), tokens, dtype=torch.bfloat16)
    selector[range(len(one.rows)), one.rows] = 1
    if is_embedding(one.module):
        return selector, difference.T.contiguous()
    return difference, selector.T.contiguous()


def _fields(fields: Mapping[str, Any], found: Sequence[_Rows]) -> dict[str, Any]:
    """The config of the result. Each new pair has a rank of its own, and the alpha that scales it by 1."""
    names = [one.module for one in found if one.rows]
    ranks = {one.module: len(one.rows) for one in found if one.rows}
    alphas = {name: math.sqrt(n) if fields.get("use_rslora") else float(n) for name, n in ranks.items()}
    changed = {
        **fields,
        "trainable_token_indices": None,
        "modules_to_save": None,
        # The first that matches counts.
        "rank_pattern": {**ranks, **(fields.get("rank_pattern") or {})},
        "alpha_pattern": {**alphas, **(fields.get("alpha_pattern") or {})},
    }
    targets, excluded = fields.get("target_modules"), fields.get("exclude_modules")
    if isinstance(targets, str) and targets != "all-linear" and _LITERAL.fullmatch(targets):
        targets = [targets]
    if targets is None or isinstance(targets, list):
        changed["target_modules"] = [*(targets or ()), *names]
    if isinstance(excluded, list):
        beyond = {suffix for name in names for suffix in suffixes(name)}
        changed["exclude_modules"] = [name for name in excluded if name not in beyond]
    return changed


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        part.chmod(0o444)
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def _refuse(code: str, message: str) -> AdapterRejected:
    return fault(code, f"{WEIGHTS_FILE}: {message}", param=WEIGHTS_FILE)

"""Base and adapter -> one ordinary checkpoint: W + scaling * BA, for a customer who outgrows sharing.

Every shard is copied by the kernel, and the weights that change are then rewritten in place, some rows at a
time: memory stays near one pair of matrices, and names, order, types and index are the base's own. The sum is
made in float32 and rounded to the base's type once. The folder appears complete or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open

from adapters.files import sync_path, write_all
from adapters.inspection.admit import admit
from adapters.inspection.base_config import read_base_config
from adapters.inspection.dora import SCALE
from adapters.inspection.experts import is_stacked, per_expert
from adapters.inspection.inspect import check_tensors
from adapters.inspection.peft_config import read_config
from adapters.inspection.quantized import method_of, quantization_of
from adapters.inspection.safetensors_header import FILE_NAMES, ITEM_BYTES, read_entries, read_header
from adapters.inspection.tensor_stats import TORCH_DTYPES
from adapters.inspection.todays_names import parts_of_experts
from adapters.model import CONFIG_FILE, WEIGHTS_FILE, BaseModel, Waivers
from adapters.offline.dequantize import INDEX_FILE, load, write_into

SINGLE_FILE = "model.safetensors"

# Other forms of the same weights, which would be the base's beside the merged ones.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".safetensors", ".h5", ".msgpack", ".onnx")

# Elements of a weight that are in memory at once, three times in float32.
_ROWS = 1 << 20
# A merged checkpoint is its owner's alone, and overflow is looked for in what comes out.
_SIZE_WAIVED = Waivers(implausible=True)


class MergeError(Exception):
    """The base's checkpoint is not one that can be merged into; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class _Change:
    """What is added to one weight: ``scaling * b @ a``, both by their names in the adapter's file.

    With DoRA the sum's rows are then multiplied by what is called ``scale_name`` there. Of a pair on a
    mixture's experts together, ``expert`` is the one that this weight is of, and ``half`` the rows of
    lora_B that are its: 0 for the gate, 1 for up, None for all.
    """

    weight: str
    a_name: str
    b_name: str
    scaling: float
    scale_name: str | None = None
    expert: int | None = None
    experts: int = 1
    half: int | None = None

    def factors(self, adapter: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """lora_A and lora_B, times the scaling, in float32; ``adapter`` is its open file."""
        a, b = adapter.get_tensor(self.a_name).float(), adapter.get_tensor(self.b_name).float()
        if self.expert is not None:
            a, b = list(per_expert(a, b, self.experts))[self.expert]
        if self.half is not None:
            b = b.chunk(2)[self.half]
        return a, b * self.scaling


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt, and how the merged model continues it at each of its positions, against base and PEFT.

    ``effect`` and ``error`` are the largest KL divergence of the next token, in nats, of base and of merged
    model from the adapter's; ``log_prob`` is the largest change in the log-probability of a likeliest token.
    """

    prompt: str
    effect: float
    error: float
    log_prob: float


class Merge(AbstractContextManager["Merge"]):
    """``with Merge(...) as merge: merge.run(); merge.verify(...); merge.keep()``; else nothing is left.

    ``adapter`` is inspected as for an upload, and converted where it must be. A quantized base is refused, or
    with ``dequantize`` written out in that type first ("bfloat16"). Raises AdapterRejected, MergeError,
    FileExistsError where ``out`` is there already, OSError.
    """

    def __init__(
        self, base_dir: Path, base: BaseModel, adapter: Path, out: Path, *, dequantize: str | None = None
    ) -> None:
        self.dequantize = dequantize
        self.base_dir = base_dir
        self.base = base
        self.out = out.absolute()
        self.partial = self.out.with_name(f".{self.out.name}-{uuid.uuid4().hex}")
        self._adapter = adapter
        # PEFT reads a mixture by transformers' names, and not by those that are served.
        self._known_to_peft = adapter
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self.out.exists() or self.out.is_symlink():
            raise FileExistsError(f"{self.out} is there already; name a folder that is not")
        with contextlib.ExitStack() as stack:
            scratch = Path(stack.enter_context(TemporaryDirectory(prefix="loraplex-merge-")))
            if admit(self._adapter, self.base, into=scratch, waived=_SIZE_WAIVED).conversions:
                self._adapter = scratch
                self._known_to_peft = self._known_to_peft if self.base.aliases else scratch
            self.partial.mkdir(parents=True)
            stack.callback(shutil.rmtree, self.partial, ignore_errors=True)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self) -> int:
        """Writes the merged checkpoint beside ``out``; returns how many weights have changed."""
        changes = self._changes()
        if (quantization := quantization_of(self.base_dir)) is not None:
            return self._run_quantized(changes, method_of(quantization))
        shards = _shards(self.base_dir)
        missing = sorted(changes.keys() - shards.keys())
        if missing and changes[missing[0]].expert is not None:
            raise MergeError(
                f"{self.base.name} keeps its experts together in one tensor, which PEFT's merge_and_unload"
                " merges"
            )
        if missing:
            raise MergeError(
                f"the checkpoint of {self.base.name} has no tensor {missing[0]}: its weights have other"
                " names, or are quantized. Merge into the original checkpoint."
            )
        for path in sorted(self.base_dir.iterdir()):
            if path.is_file() and not path.name.endswith(_OTHER_WEIGHTS):
                shutil.copyfile(path, self.partial / path.name)
        for name in sorted(set(shards.values())):
            here = [change for weight, change in changes.items() if shards[weight] == name]
            self._merge_shard(name, here)
        return len(changes)

    def _run_quantized(self, changes: Mapping[str, _Change], method: str) -> int:
        if self.dequantize is None:
            raise MergeError(
                f"{self.base.name} is quantized ({method}): an adapter is lost in so few bits. Merge into the"
                " checkpoint that was quantized, or give --dequantize to write this one out in bfloat16 with"
                " the adapter added."
            )
        done = set()

        with safe_open(self._adapter / WEIGHTS_FILE, framework="pt") as adapter:

            def changed(layer: str, weight: torch.Tensor) -> torch.Tensor:
                change = changes.get(f"{layer}.weight")
                if change is None:
                    return weight
                done.add(change.weight)
                a, b = change.factors(adapter)
                return torch.addmm(weight.float(), b, a)

            try:
                write_into(self.partial, self.base_dir, dtype=self.dequantize, change=changed)
            except ValueError as error:
                raise MergeError(str(error)) from None
        if missing := sorted(changes.keys() - done):
            raise MergeError(f"the checkpoint of {self.base.name} has no layer {missing[0]}")
        return len(done)

    def verify(self, prompts: list[str]) -> list[Probe]:
        """Runs base, base with PEFT's adapter, and merged model in float32, one model at a time."""
        from peft import PeftModel
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.base_dir, local_files_only=True)
        ids = [torch.tensor([tokenizer(prompt)["input_ids"]]) for prompt in prompts]
        with torch.inference_mode():
            model = PeftModel.from_pretrained(load(self.base_dir), self._known_to_peft).eval()
            adapted = [_log_probs(model, one) for one in ids]
            with model.disable_adapter():
                plain = [_log_probs(model, one) for one in ids]
            del model
            merged = load(self.partial).eval()
            return [
                _compare(prompt, before, want, _log_probs(merged, one))
                for prompt, before, want, one in zip(prompts, plain, adapted, ids, strict=True)
            ]

    def keep(self) -> None:
        """Gives the folder its name, on disk when this returns."""
        for path in self.partial.iterdir():
            sync_path(path)
        sync_path(self.partial)
        if self.out.exists():
            raise FileExistsError(f"{self.out} was made by somebody else in the meantime")
        self.partial.rename(self.out)
        sync_path(self.out.parent)

    def _changes(self) -> dict[str, _Change]:
        """By the name of the weight."""
        config = read_config(self._adapter / CONFIG_FILE, self.base)
        pairs = check_tensors(read_header(self._adapter / WEIGHTS_FILE), config, self.base)
        if config.saves:
            raise MergeError(
                "the adapter has a head of its own: PEFT's merge_and_unload merges that, not here"
            )
        if vocabulary := sorted(self.base.vocabulary.keys() & pairs.keys()):
            raise MergeError(
                f"the adapter changes {vocabulary[0]}: that is merged by PEFT's merge_and_unload, not here"
            )
        changes = [
            _Change(
                f"{module}.weight",
                pair.a_name,
                pair.b_name,
                config.scaling_of(module),
                pair.a_name.removesuffix(".lora_A.weight") + SCALE if config.dora else None,
            )
            for module, pair in pairs.items()
            if not is_stacked(module)
        ]
        parts = parts_of_experts(str((read_base_config(self.base_dir) or {}).get("model_type")))
        for module in filter(is_stacked, pairs):
            pair, scaling = pairs[module], config.scaling_of(module)
            layer, experts = module.removesuffix(".base_layer"), self.base.modules[module].experts
            halves = ((parts[2], None),) if layer == module else ((parts[0], 0), (parts[1], 1))
            changes += [
                replace(
                    _Change(f"{layer}.{expert}.{part}.weight", pair.a_name, pair.b_name, scaling),
                    expert=expert,
                    experts=experts,
                    half=half,
                )
                for expert in range(experts)
                for part, half in halves
            ]
        return {change.weight: change for change in changes}

    def _merge_shard(self, name: str, changes: list[_Change]) -> None:
        target = self.partial / name
        shutil.copyfile(self.base_dir / name, target)
        with (
            target.open("r+b") as shard,
            safe_open(self._adapter / WEIGHTS_FILE, framework="pt") as adapter,
        ):
            data, tensors = read_entries(shard.fileno())
            for change in changes:
                shape = self.base.modules[change.weight.removesuffix(".weight")]
                entry = tensors[change.weight]
                if entry.dtype not in ITEM_BYTES or entry.shape != (shape.out_features, shape.in_features):
                    dtype = FILE_NAMES.get(entry.dtype, entry.dtype)
                    raise MergeError(
                        f"{change.weight} is {dtype} of shape {list(entry.shape)} in {name}, and must"
                        f" be F32, F16 or BF16 of shape {[shape.out_features, shape.in_features]}. Merge into"
                        " the original checkpoint, not into a quantized one."
                    )
                a, b = change.factors(adapter)
                scale = adapter.get_tensor(change.scale_name) if change.scale_name else None
                begin = data + entry.begin
                _add(shard.fileno(), begin, entry.dtype, a, b, change.weight, scale)


def _add(
    descriptor: int,
    begin: int,
    dtype: str,
    a: torch.Tensor,
    b: torch.Tensor,
    weight: str,
    scale: torch.Tensor | None = None,
) -> None:
    """Adds ``b @ a`` to the matrix at byte ``begin`` of an open file, rows by rows; ``scale`` is DoRA's."""
    size = ITEM_BYTES[dtype]
    columns = a.shape[1]
    step = max(1, _ROWS // columns)
    for at in range(0, b.shape[0], step):
        part = b[at : at + step]
        place = begin + at * columns * size
        data = bytearray(os.pread(descriptor, len(part) * columns * size, place))
        rows = torch.frombuffer(data, dtype=TORCH_DTYPES[dtype]).view(len(part), columns)
        added = torch.addmm(rows.float(), part, a)
        total = (added if scale is None else added * scale[at : at + step, None]).to(rows.dtype)
        if not total.isfinite().all():
            raise MergeError(f"{weight} with the adapter is too large for {dtype}")
        write_all(descriptor, total.flatten().view(torch.uint8).numpy(), place)


def _shards(base_dir: Path) -> Mapping[str, str]:
    """Weight -> the file in ``base_dir`` that holds it."""
    index, single = base_dir / INDEX_FILE, base_dir / SINGLE_FILE
    if index.is_file():
        shards = dict(json.loads(index.read_text())["weight_map"])
        if any(Path(name).name != name for name in shards.values()):
            raise MergeError(f"{index} names files outside its folder")
        return shards
    if not single.is_file():
        raise MergeError(f"{base_dir} holds neither {SINGLE_FILE} nor {INDEX_FILE}; save the base with them")
    with safe_open(single, framework="pt") as weights:
        return dict.fromkeys(weights.keys(), SINGLE_FILE)


def _log_probs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(positions, vocabulary) of the next token after each position."""
    return torch.log_softmax(model(ids).logits[0].float(), dim=-1)


def _compare(prompt: str, plain: torch.Tensor, want: torch.Tensor, got: torch.Tensor) -> Probe:
    best = want.argmax(dim=-1, keepdim=True)
    return Probe(
        prompt,
        effect=_divergence(want, plain),
        error=_divergence(want, got),
        log_prob=(want - got).gather(-1, best).abs().max().item(),
    )


def _divergence(want: torch.Tensor, other: torch.Tensor) -> float:
    return max(0.0, (want.exp() * (want - other)).sum(-1).max().item())

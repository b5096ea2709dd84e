"""DoRA in a worker: which adapter scales which outputs, by slot.

Its d (``adapters.inspection.dora``) lies in the adapter's file beside A and B, where vLLM never sees it. It
is read when the adapter is staged, put beside the slot when that is filled, and multiplied with by the
kernels (``adapters.worker.cpu.kernels``) once A and B have been added:

    y = d * (y - bias) + bias       for the rows of the tokens on that slot
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters.inspection.dora import SCALE
from adapters.inspection.safetensors_header import read_entries
from adapters.model import WEIGHTS_FILE
from adapters.worker.names import forward

PREFIX = "base_model.model."

# vLLM's name of a layer, or of a part of a fused one -> d, float32
Scales = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Scaling:
    """The columns of a layer's output from ``first`` on are multiplied by ``factors``, ``bias`` left out."""

    first: int
    factors: torch.Tensor
    bias: torch.Tensor | None

    def apply(self, y: torch.Tensor, rows: slice | torch.Tensor) -> None:
        """Changes these rows of ``y``, in float32."""
        columns = slice(self.first, self.first + len(self.factors))
        part = y[rows, columns].float()
        bias = 0.0 if self.bias is None else self.bias
        y[rows, columns] = ((part - bias) * self.factors + bias).to(y.dtype)


def accept_dora() -> None:
    """vLLM refuses a config that says ``use_dora``; from now on it reads one as a LoRA's, in this process."""
    from vllm.lora import worker_manager

    class Helper(worker_manager.PEFTHelper):  # type: ignore[misc]
        def __post_init__(self) -> None:
            self.use_dora = False
            super().__post_init__()

    if worker_manager.PEFTHelper.__name__ != Helper.__name__:
        worker_manager.PEFTHelper = Helper


class DoraScales:
    """``tables`` is vLLM's ``LRUCacheLoRAModelManager`` on one CPU worker, with our kernels in place."""

    def __init__(self, tables: Any) -> None:
        mapper = getattr(tables.model, "hf_to_vllm_mapper", None)
        self._tables = tables
        self._renames = mapper.get_rename_mapper() if mapper is not None else None
        accept_dora()

    def read(self, folder: str) -> Scales:
        """Of the adapter in ``folder``; empty where it is no DoRA. Raises OSError and ValueError."""
        path = Path(folder) / WEIGHTS_FILE
        scales = {}
        with path.open("rb", buffering=0) as file:
            data, tensors = read_entries(file.fileno())
            for name, tensor in tensors.items():
                if name.endswith(SCALE):
                    size = tensor.end - tensor.begin
                    read = bytearray(os.pread(file.fileno(), size, data + tensor.begin))
                    if len(read) != size:
                        raise ValueError(f"{path}: the file ends within {name}")
                    module = name.removesuffix(SCALE).removeprefix(PREFIX)
                    scales[forward(module, self._renames)] = torch.frombuffer(read, dtype=torch.float32)
        return scales

    def fill(self, slot: int, scales: Scales) -> None:
        """From now on ``slot`` has these and no others. ValueError where one fits no layer."""
        placed = 0
        for name, layer in self._tables.modules.items():
            found = list(_scalings(layer, self._of_layer(name, layer, scales))) if scales else []
            by_slot = layer.punica_wrapper.scalings.setdefault(id(layer.lora_b_stacked), {})
            by_slot.pop(slot, None)
            if found:
                by_slot[slot] = found
                placed += len(found)
        if placed != len(scales):
            raise ValueError(f"{len(scales) - placed} of {len(scales)} DoRA scales fit no layer")

    def _of_layer(self, name: str, layer: Any, scales: Scales) -> Iterator[tuple[int, torch.Tensor]]:
        """(first column, d) of each part of ``layer`` that is scaled."""
        parts: Sequence[str] = self._tables.packed_modules.get(name) or [name]
        widths = getattr(layer, "output_slices", ())
        first = 0
        for part, width in zip(parts, widths if len(parts) > 1 else [sum(widths)], strict=False):
            if (factors := scales.get(part)) is not None:
                if len(factors) != width:
                    raise ValueError(f"DoRA's scale of {part} has {len(factors)} numbers, not {width}")
                yield first, factors
            first += width


def _scalings(layer: Any, parts: Iterable[tuple[int, torch.Tensor]]) -> Iterator[Scaling]:
    base = getattr(layer, "base_layer", None)
    bias = None if getattr(base, "skip_bias_add", False) else getattr(base, "bias", None)
    for first, factors in parts:
        own = None if bias is None else bias[first : first + len(factors)].float()
        yield Scaling(first, factors, own)

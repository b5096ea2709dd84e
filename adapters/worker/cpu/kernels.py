"""LoRA on a CPU: a replacement for the matrix products that vLLM runs there.

vLLM's own gather a copy of a slot's whole weights for every token, (tokens, rank, features), and take a
token without an adapter (slot -1) for one of the last slot. Here the tokens of a step are grouped by slot
once, and each slot that occurs is multiplied once, as wide as its adapter's rank and where it lies: a slot
of a linear layer is not a copy of the adapter but refers to it in host memory, so that to fill it takes
microseconds.

    install(tables)     in place of vLLM's own wrappers, when no adapter is loaded yet

Weights are float32 (``server.engine`` asks for it): a product of a few rows costs torch 3 us with them and
16 us in bfloat16, most of it before it begins.

On a CPU vLLM runs LoRA eagerly, so what is installed later is what runs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.layers import LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from adapters.worker.dora import Scaling

# What one slot does to one slice of a layer's output: matrices by which its tokens are multiplied, one after
# the other, (features, rank) and (rank, features). None: its adapter leaves that slice alone.
Part = tuple[torch.Tensor, ...] | None

# A run costs two small products, sorting a copy of the tokens. More runs than this for each slot are sorted.
RUNS_PER_SLOT = 2
# Rows of a run from which it is worth while to round its weights to the model's dtype, if that is faster.
WIDE_ROWS = 64
_ADOPTED = (BaseLinearLayerWithLoRA, VocabParallelEmbeddingWithLoRA, LogitsProcessorWithLoRA)


@dataclass(frozen=True, slots=True)
class Groups:
    """The rows of a batch by slot. ``runs``: (slot, first row, row after the last), without slot -1.

    Where slots take turns too often, ``runs`` are those of the rows in ``order``; ``place`` then says for
    every row of the batch where it is among them, which is one past the end for a row without a slot.
    """

    runs: tuple[tuple[int, int, int], ...]
    order: torch.Tensor | None = None
    place: torch.Tensor | None = None

    @classmethod
    def of(cls, slots: Sequence[int]) -> Groups:
        """``slots``: the slot of each row, -1 for none."""
        runs = _runs(slots)
        if len(runs) <= RUNS_PER_SLOT * len({slot for slot, _, _ in runs}):
            return cls(runs)
        order = sorted((row for row, slot in enumerate(slots) if slot >= 0), key=lambda row: slots[row])
        place = [len(order)] * len(slots)
        for index, row in enumerate(order):
            place[row] = index
        return cls(_runs([slots[row] for row in order]), torch.tensor(order), torch.tensor(place))


def _runs(slots: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    runs = []
    first = 0
    for row in range(1, len(slots) + 1):
        if row == len(slots) or slots[row] != slots[first]:
            if slots[first] >= 0:
                runs.append((slots[first], first, row))
            first = row
    return tuple(runs)


class GroupedPunicaWrapper(PunicaWrapperCPU):  # type: ignore[misc]  # vLLM is not typed for us
    """Each method does what vLLM's says in its docstring, and nothing to a row of slot -1.

    ``y`` is changed in place; its rows and those of ``x`` are the tokens of the last ``update_metadata``.
    """

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        self._tokens = Groups(())
        self._samples = Groups(())
        # id of a layer's B weights (which the layer keeps, so it names nothing else) -> slot -> slices.
        self._parts: dict[int, list[list[Part]]] = {}
        # By the same id and slot: what DoRA multiplies outputs with. See adapters.worker.dora.
        self.scalings: dict[int, dict[int, list[Scaling]]] = {}

    def __repr__(self) -> str:
        return f"GroupedPunicaWrapper({len(self._parts)} layers, runs {list(self._tokens.runs)})"

    def adopt(self, layer: Any) -> None:
        """Serves ``layer`` from now on, and learns from its ``set_lora`` how wide each slot really is."""
        if isinstance(layer.lora_b_stacked, tuple):
            full = _pairs(layer.lora_a_stacked, layer.lora_b_stacked)
        elif layer.lora_a_stacked.dim() == 3:  # an embedding, whose A is a table that the layer looks up in
            full = _singles(layer.lora_b_stacked)
        else:
            full = _pairs((layer.lora_a_stacked,), (layer.lora_b_stacked,))
        parts = list(full)
        self._parts[id(layer.lora_b_stacked)] = parts
        set_lora, reset_lora = layer.set_lora, layer.reset_lora
        referring = isinstance(layer.lora_b_stacked, tuple) and layer.tp_size == 1

        @functools.wraps(reset_lora)
        def reset_and_learn(index: int) -> None:
            if not referring:
                reset_lora(index)
            parts[index] = [None] * len(full[index])

        @functools.wraps(set_lora)
        def set_and_learn(index: int, lora_a: Any, lora_b: Any) -> None:
            a, b = (given if isinstance(given, list) else [given] for given in (lora_a, lora_b))
            whole = len(a) == len(b) == len(full[index])
            if referring and whole and all(map(_fits, a, b, full[index])):
                parts[index] = [_referring(*pair) for pair in zip(a, b, strict=True)]
                return
            if referring:
                reset_lora(index)  # the slot's own memory; vLLM's ``set_lora`` would call what is above
            set_lora(index, lora_a, lora_b)  # which raises where a shape is not the layer's
            if whole:
                ranks = [0 if weights is None else weights.shape[1] for weights in b]
                parts[index] = [_narrow(part, rank) for part, rank in zip(full[index], ranks, strict=True)]
            else:  # vLLM has split one tensor for several slices
                parts[index] = full[index]

        layer.set_lora, layer.reset_lora = set_and_learn, reset_and_learn

    def forget(self, slot: int) -> None:
        """Lets go of the adapter that was in ``slot``, whose memory is others' once it has been evicted."""
        for parts in self._parts.values():
            parts[slot] = [None] * len(parts[slot])

    def update_metadata(
        self, mapping: Any, lora_index_to_id: Any, max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self._tokens = Groups.of(self.token_lora_indices.tolist())
        self.sample(self.sampler_indices)

    def sample(self, slots: torch.Tensor) -> None:
        """``slots`` (rows,): the slot of each row of the next ``add_lora_logits``, -1 for none."""
        self._samples = Groups.of(slots.tolist())

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        parts = self._parts.get(id(lora_b_stacked)) or _pairs(lora_a_stacked, lora_b_stacked)
        _add(self._tokens, y, x, parts, output_slices, scale=scale)
        if by_slot := self.scalings.get(id(lora_b_stacked)):
            self._scale(y.view(-1, y.shape[-1]), by_slot)

    def _scale(self, y: torch.Tensor, by_slot: Mapping[int, Sequence[Scaling]]) -> None:
        for slot, first, last in self._tokens.runs:
            order = self._tokens.order
            rows = slice(first, last) if order is None else order[first:last]
            for scaling in by_slot.get(slot, ()):
                scaling.apply(y, rows)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        parts = self._parts.get(id(lora_b_stacked)) or _pairs((lora_a_stacked,), (lora_b_stacked,))
        # The model and the adapter may pad the vocabulary differently.
        _add(self._samples, y, x, parts, (min(y.shape[-1], lora_b_stacked.shape[2]),), scale=scale)

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        parts = self._parts.get(id(lora_b_stacked)) or _singles(lora_b_stacked)
        # vLLM looks all ranks up, whatever the adapter's own.
        _add(self._tokens, y, x, parts, (lora_b_stacked.shape[2],))

    def add_shrink(
        self,
        y: tuple[torch.Tensor, ...] | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """For layers that pass what is between A and B to other workers: always as wide as the slot."""
        for out, weights in zip(y, lora_a_stacked, strict=True):
            _add(self._tokens, out, x, _singles(weights), (weights.shape[2],), scale=scale)

    def add_expand(
        self,
        y: torch.Tensor,
        x: tuple[torch.Tensor, ...] | torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        if not add_inputs:
            y.narrow(-1, offset_start, sum(output_slices)).zero_()
        for rows, weights, size in zip(x, lora_b_stacked, output_slices, strict=True):
            _add(self._tokens, y, rows, _singles(weights), (size,), offset=offset_start)
            offset_start += size


def install(tables: Any, kind: type[GroupedPunicaWrapper] | None = None) -> list[GroupedPunicaWrapper]:
    """Replaces the wrappers of vLLM's ``LRUCacheLoRAModelManager``, in it and in all its layers.

    Those of another ``kind`` multiply what is in the slots, and adopt no layer. Returns the new ones.
    """
    replacements: dict[int, GroupedPunicaWrapper] = {}
    for prefix, wrapper in tables.punica_wrapper_mapping.items():
        if id(wrapper) not in replacements:
            tokens, batches = len(wrapper._token_lora_indices), len(wrapper._seq_lengths)
            replacements[id(wrapper)] = (kind or GroupedPunicaWrapper)(tokens, batches, wrapper.device)
        tables.punica_wrapper_mapping[prefix] = replacements[id(wrapper)]
    for layer in tables.modules.values():
        replacement = replacements[id(layer.punica_wrapper)]
        layer.set_mapping(replacement)
        if kind is None and isinstance(
            layer, _ADOPTED
        ):  # experts have methods of their own, which no CPU wrapper has
            replacement.adopt(layer)
    tables._last_mapping = None  # or vLLM would think that the new wrappers know the batch already
    return list(replacements.values())


def _faster(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for products of ``dtype``; else torch is ten times slower."""
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in native and native[dtype]()


def _pairs(a_stacked: Sequence[torch.Tensor], b_stacked: Sequence[torch.Tensor]) -> list[list[Part]]:
    """slot -> slices, each as wide as the slot: A (slots, 1, rank, in) and B (slots, 1, out, rank)."""
    slices = [
        list(zip(a[:, 0].mT, b[:, 0].mT, strict=True)) for a, b in zip(a_stacked, b_stacked, strict=True)
    ]
    return [list(parts) for parts in zip(*slices, strict=True)]


def _singles(stacked: torch.Tensor) -> list[list[Part]]:
    return [[(weights,)] for weights in stacked[:, 0].mT]


def _fits(lora_a: torch.Tensor | None, lora_b: torch.Tensor | None, slot: Part) -> bool:
    """Whether A (rank, in) and B (out, rank) are of the shapes that the slot is for, or not there."""
    if lora_a is None or lora_b is None or slot is None:
        return lora_a is lora_b is None
    (inputs, rank), (_, outputs) = (weights.shape for weights in slot)
    return lora_a.shape == (lora_b.shape[1], inputs) and lora_b.shape[0] == outputs and len(lora_a) <= rank


def _referring(lora_a: torch.Tensor | None, lora_b: torch.Tensor | None) -> Part:
    """Of A (rank, in) and B (out, rank) themselves."""
    return None if lora_a is None or lora_b is None else (lora_a.mT, lora_b.mT)


def _narrow(part: Part, rank: int) -> Part:
    """The first ``rank`` of a slot's ranks; what is behind them is zero."""
    if part is None or not rank:
        return None
    *shrink, expand = part
    return (*(a[:, :rank] for a in shrink), expand[:rank] if shrink else expand)


def _add(
    groups: Groups,
    y: torch.Tensor,
    x: torch.Tensor,
    parts: Sequence[Sequence[Part]],
    sizes: Sequence[int],
    *,
    offset: int = 0,
    scale: float = 1.0,
) -> None:
    """Adds to the columns of ``y`` from ``offset`` on what ``parts``, by slot, make of the rows of ``x``.

    ``sizes``: how many columns each slice of a slot's parts has.
    """
    runs = [(parts[slot], first, last) for slot, first, last in groups.runs if any(parts[slot])]
    if not runs:
        return
    y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    if groups.order is None or groups.place is None:
        _add_runs(runs, y, x, sizes, offset, scale)
        return
    delta = torch.zeros((len(groups.order) + 1, sum(sizes)), dtype=torch.float32, device=y.device)
    _add_runs(runs, delta, x.index_select(0, groups.order), sizes, 0, scale)
    y.narrow(1, offset, sum(sizes)).add_(delta.index_select(0, groups.place))


def _add_runs(
    runs: Iterable[tuple[Sequence[Part], int, int]],
    y: torch.Tensor,
    x: torch.Tensor,
    sizes: Sequence[int],
    offset: int,
    scale: float,
) -> None:
    for parts, first, last in runs:
        rows, out = x[first:last], y[first:last]
        if last - first < WIDE_ROWS or not _faster(x.dtype):
            rows = rows.to(next(part[0].dtype for part in parts if part))
        deltas, at, column = [], [], offset
        for part, size in zip(parts, sizes, strict=True):
            if part is not None:
                deltas.append(_product(rows, part, size))
                at.append(column)
            column += size
        if len(deltas) == len(parts) > 1:  # one sum is quicker than one for each slice
            deltas, at = [torch.cat(deltas, 1)], [offset]
        for delta, column in zip(deltas, at, strict=True):
            out.narrow(1, column, delta.shape[1]).add_(delta, alpha=scale)


def _product(x: torch.Tensor, matrices: Sequence[torch.Tensor], columns: int) -> torch.Tensor:
    """``x`` times one matrix after the other, each rounded to the dtype of ``x``; the first ``columns``."""
    for matrix in matrices:
        x = x.mm(matrix.to(x.dtype))
    return x[:, :columns]

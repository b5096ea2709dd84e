"""vLLM's kernels for a GPU, written out in torch: what calls them runs where there is neither GPU nor Triton.

So its wrapper ``PunicaWrapperGPU``, and ours around it, are tried as they are: what they tell kernels of
tokens, slots and experts. That the kernels themselves do this is tried in Triton's interpreter
(``interpreted``).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.lora.punica_wrapper import punica_gpu


def lora_shrink(
    x: torch.Tensor,
    a_stacked: Any,
    y: torch.Tensor,
    slots: torch.Tensor,
    *meta: torch.Tensor | float,
) -> None:
    """``y`` (slices, tokens, ranks) of ``x`` (tokens, inputs), by the slot of each token, -1 for none."""
    *_, no_lora, _active, scaling = meta
    assert isinstance(no_lora, torch.Tensor)
    if no_lora.item():
        return
    rows = (slots >= 0).nonzero().flatten()
    for out, a in zip(y, a_stacked, strict=True):
        products = torch.einsum("ti,tri->tr", x[rows].float(), a[slots[rows].long(), 0].float())
        out[rows] = (products * scaling).to(out.dtype)


def lora_expand(
    x: torch.Tensor,
    b_stacked: Any,
    y: torch.Tensor,
    slots: torch.Tensor,
    *meta: torch.Tensor,
    offset_start: int = 0,
    add_inputs: bool = False,
) -> None:
    """Into ``y`` (tokens, outputs), from ``offset_start`` on, slice after slice."""
    if meta[-2].item():
        return
    rows, first = (slots >= 0).nonzero().flatten(), offset_start
    for shrunk, b in zip(x, b_stacked, strict=True):
        products = torch.einsum("tr,tor->to", shrunk[rows].float(), b[slots[rows].long(), 0].float())
        columns = slice(first, first + b.shape[2])
        if add_inputs:
            products += y[rows, columns].float()
        y[rows, columns] = products.to(y.dtype)
        first += b.shape[2]


def fused_moe_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    a_stacked: Any,
    b_stacked: Any,
    topk_weights: torch.Tensor,
    sorted_ids: torch.Tensor | None,
    expert_ids: torch.Tensor,
    after_padding: torch.Tensor | None,
    slots: torch.Tensor,
    most_ranks: int,
    top_k: int,
    lora_ids: torch.Tensor,
    active: torch.Tensor,
    enabled: torch.Tensor,
    block: int,
    *launch: Any,
) -> None:
    """Adds to ``y`` (tokens, experts of a token, outputs) what an adapter's expert makes of each pair.

    ``x``: a row for each token, or for each pair. Which expert has a pair is in ``expert_ids``: by pair, or,
    where there are ``sorted_ids``, by slot and block of these.
    """
    weighted, fully, offset, add_inputs = launch[-4:]
    assert add_inputs
    assert not fully
    assert offset == 0
    each = topk_weights.shape[1] if len(x) == len(topk_weights) else 1
    for slot, expert, pair in _pairs(
        topk_weights.numel(), sorted_ids, expert_ids, after_padding, slots, block
    ):
        if not enabled[slot]:
            continue
        token, place = divmod(pair, topk_weights.shape[1])
        first = 0
        for a, b in zip(a_stacked, b_stacked, strict=True):
            product = b[slot, expert] @ (a[slot, expert] @ x[pair // each])
            if weighted:
                product *= topk_weights[token, place]
            y[token, place, first : first + len(product)] += product
            first += len(product)


def _pairs(
    count: int,
    sorted_ids: torch.Tensor | None,
    expert_ids: torch.Tensor,
    after_padding: torch.Tensor | None,
    slots: torch.Tensor,
    block: int,
) -> list[tuple[int, int, int]]:
    """(slot, expert, pair) of all pairs of a token and an expert that an adapter has."""
    if sorted_ids is None or after_padding is None:
        each = count // len(slots)
        found = [(int(slots[pair // each]), int(expert_ids[pair]), pair) for pair in range(count)]
        return [one for one in found if one[0] >= 0]
    return [
        (slot, int(expert_ids[slot, at // block]), int(sorted_ids[slot, at]))
        for slot, length in enumerate(after_padding.tolist())
        for at in range(length)
        if sorted_ids[slot, at] < count
    ]


def install(patch: pytest.MonkeyPatch) -> None:
    """``PunicaWrapperGPU`` calls these until ``patch`` is undone; only now vLLM's own are registered here."""
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

    for name, made in {
        "LoRAKernelMeta": LoRAKernelMeta,
        "lora_shrink": lora_shrink,
        "lora_expand": lora_expand,
        "fused_moe_lora": fused_moe_lora,
    }.items():
        patch.setattr(punica_gpu, name, made, raising=False)

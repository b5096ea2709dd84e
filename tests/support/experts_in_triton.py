"""What ``interpreted`` runs of a mixture: vLLM's fused kernels on the tensors that adapters were put into.

Also with the kernels written out in torch (``kernels_in_torch``). Float32, which both multiply exactly, so
that what a token gets of each expert is held against PEFT's delta of it to the sixth digit.

Not tried here: which block of tokens belongs to which expert is computed by a CUDA kernel
(``moe_lora_align_block_size``), of which a CPU build has none; ``aligned`` stands in for it. Nor slots
of more than 128 ranks, whose kernels multiply in bfloat16, which the interpreter does not.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm import _custom_ops
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import FusedMoEWithLoRA, LoRAMapping
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.lora_context import MoELoRAContext
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin

from adapters.inspection.admit import admit
from tests.service.worker.test_experts import (
    EXPERTS,
    HIDDEN,
    INNER,
    LAYER,
    RECIPES,
    Experts,
    added,
    gpt_oss_trained,
    loaded,
    tables,
    trained_by,
)

TOP = 2  # experts of a token
# In float32 the same sums in another order.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Shape:
    """Which of vLLM's kernels runs is decided by these."""

    slots: int
    rank: int
    tokens: int
    recipes: tuple[str, ...] = tuple(RECIPES)[:3]


SHAPES = {
    "a few tokens": Shape(slots=32, rank=16, tokens=6),
    "a few tokens, wider": Shape(slots=32, rank=128, tokens=6),
    "many tokens": Shape(slots=3, rank=16, tokens=40),
    "GPT-OSS, in slots of rounded sizes": Shape(slots=3, rank=16, tokens=40, recipes=("GPT-OSS",)),
}


def aligned(
    topk_ids: torch.Tensor,
    lora_of_token: torch.Tensor,
    experts: int,
    block: int,
    slots: int,
    most_tokens: int,
    most_blocks: int,
    sorted_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    after_padding: torch.Tensor,
    enabled: torch.Tensor,
    lora_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
) -> None:
    """Of each slot its pairs (token, expert), by expert, each expert's filled up to whole blocks."""
    assert expert_map is None
    nobody = topk_ids.numel()
    sorted_ids.fill_(nobody)
    expert_ids.fill_(-1)
    after_padding.zero_()
    for slot in {int(one) for one in lora_ids.tolist() if one >= 0 and enabled[one]}:
        at = 0
        for expert in range(experts):
            mine = (topk_ids == expert) & (lora_of_token[: len(topk_ids), None] == slot)
            pairs = mine.flatten().nonzero().flatten().to(torch.int32)
            sorted_ids[slot * most_tokens + at : slot * most_tokens + at + len(pairs)] = pairs
            blocks = -(-len(pairs) // block)
            expert_ids[slot * most_blocks + at // block :][:blocks] = expert
            at += blocks * block
        after_padding[slot] = at


class Stacked(Experts):
    """vLLM's layer with so many slots of such a rank; its own code fills them."""

    def __init__(self, slots: int, rank: int) -> None:
        self.adapter_enabled = torch.zeros(slots + 1, dtype=torch.int32)

        def zeros(out: int, into: int) -> torch.Tensor:
            return torch.zeros(slots, EXPERTS, out, into)

        self.w13_lora_a_stacked = (zeros(rank, HIDDEN), zeros(rank, HIDDEN))
        self.w13_lora_b_stacked = (zeros(INNER, rank), zeros(INNER, rank))
        self.w2_lora_a_stacked, self.w2_lora_b_stacked = (zeros(rank, INNER),), (zeros(HIDDEN, rank),)


def fill(layer: Any, slot: int, recipe: str, folder: Path) -> dict[str, torch.Tensor]:
    """Puts an adapter that PEFT made into ``slot``; what PEFT adds: (experts, out, in) by projection."""
    model, base, name = trained_by(recipe, folder)
    admit(folder, base, serving_dtype="float32")
    lora = loaded(folder)
    LoRAModelManager._convert_3d_to_2d_moe_lora(tables(), lora, layer, name)
    made = lora.get_lora(name)
    FusedMoEWithLoRA.set_lora(layer, slot, made.lora_a, made.lora_b)
    found = added(model)
    return {"w13": found["gate_up_proj"], "w2": found["down_proj"]}


def fill_gpt_oss(layer: Any, slot: int, folder: Path) -> dict[str, torch.Tensor]:
    """The same of GPT-OSS, whose rows of gate and up take turns; sizes are rounded up by 8."""
    model, lora = gpt_oss_trained(folder), loaded(folder)
    LoRAModelManager._convert_3d_to_2d_moe_lora(tables(model="GptOssForCausalLM"), lora, layer, LAYER)
    FusedMoEWithLoRA.set_lora(layer, slot, lora.get_lora(LAYER).lora_a, lora.get_lora(LAYER).lora_b)
    found = {name: delta.transpose(1, 2) for name, delta in added(model).items()}
    return {
        "w13": torch.nn.functional.pad(found["gate_up_proj"], (0, 8, 0, 16)),
        "w2": torch.nn.functional.pad(found["down_proj"], (0, 8, 0, 8)),
    }


def context(layer: Any, wrapper: Any, shape: Shape) -> MoELoRAContext:
    """As vLLM's layer makes it for its kernels."""
    layer.max_loras, layer.fully_sharded, layer.tp_rank = shape.slots, False, 0
    layer.enable_moe_shared_loras, layer._enable_aux_cuda_stream, layer._events = False, False, None
    layer._lora_stream, layer.punica_wrapper = None, wrapper
    layer.moe_config = SimpleNamespace(experts_per_token=TOP)
    made: MoELoRAContext = FusedMoEWithLoRA._build_lora_context(layer)
    return made


def difference(shape: Shape, folder: Path) -> float:
    """The largest over all tokens and experts, of three adapters in their slots and of tokens without."""
    _custom_ops.moe_lora_align_block_size = aligned
    generator = torch.Generator().manual_seed(shape.rank)
    layer, wanted = Stacked(shape.slots, shape.rank), {}
    for index, recipe in enumerate(shape.recipes):
        slot = shape.slots - 1 - index
        inside = folder / str(index)
        of_gpt_oss = recipe == "GPT-OSS"
        wanted[slot] = fill_gpt_oss(layer, slot, inside) if of_gpt_oss else fill(layer, slot, recipe, inside)
    config = LoRAConfig(
        max_loras=shape.slots, max_lora_rank=shape.rank, max_cpu_loras=shape.slots, lora_dtype=torch.float32
    )
    wrapper = PunicaWrapperGPU(shape.tokens, shape.tokens, "cpu", lora_config=config)
    drawn = torch.randint(0, len(wanted) + 1, (shape.tokens,), generator=generator)
    slots = [(-1, *wanted)[i] for i in drawn]
    ids = tuple(slot + 1 for slot in slots)
    wrapper.update_metadata(
        LoRAMapping(ids, ids, is_prefill=True), list(range(1, shape.slots + 1)), shape.slots + 1, 100
    )
    topk_ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP] for _ in slots]).to(
        torch.int32
    )
    weights = torch.rand(shape.tokens, TOP, generator=generator)
    x = torch.randn(shape.tokens, HIDDEN, generator=generator)
    inner = torch.randn(shape.tokens * TOP, INNER, generator=generator)
    w1, w2 = torch.empty(EXPERTS, 2 * INNER, HIDDEN), torch.empty(EXPERTS, HIDDEN, INNER)
    lora = context(layer, wrapper, shape)
    mixin = LoRAExpertsMixin()
    activation = MoEActivation.SWIGLUOAI if "GPT-OSS" in shape.recipes else MoEActivation.SILU
    mixin.moe_config = SimpleNamespace(activation=activation)
    got13 = torch.zeros(shape.tokens * TOP, 2 * INNER)
    placed = mixin.apply_w13_lora(
        lora, y=got13, x=x, topk_ids=topk_ids, topk_weights=weights, expert_map=None, w1=w1, w2=w2,
        num_tokens=shape.tokens, top_k_num=TOP,
    )  # fmt: skip
    got2 = torch.zeros(shape.tokens, TOP, HIDDEN)
    sorted_ids, expert_ids, after, mapping = placed
    mixin.apply_w2_lora(
        lora, y=got2, x=inner, topk_weights=weights, sorted_token_ids_lora=sorted_ids,
        expert_ids_lora=expert_ids, num_tokens_post_padded_lora=after, token_lora_mapping=mapping,
        num_tokens=shape.tokens, w1=w1, w2=w2, top_k_num=TOP,
    )  # fmt: skip
    want13, want2 = torch.zeros_like(got13), torch.zeros_like(got2)
    for token, slot in enumerate(slots):
        for place, expert in enumerate(topk_ids[token].tolist()):
            if slot >= 0:
                pair = token * TOP + place
                want13[pair] = wanted[slot]["w13"][expert] @ x[token]
                want2[token, place] = weights[token, place] * (wanted[slot]["w2"][expert] @ inner[pair])
    assert min(want13.abs().max(), want2.abs().max()) > 0.1, "nothing was to be added"
    pairs = ((got13, want13), (got2, want2))
    return max(float((got - want).abs().max()) for got, want in pairs)


def differences() -> dict[str, float]:
    """By the kinds of ``SHAPES``."""
    found = {}
    for kind, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            found[kind] = difference(shape, Path(folder))
    return found

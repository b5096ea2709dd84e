"""DoRA's scales in the kernels: whose rows are multiplied, in fused layers, beside biases, and until when."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapters.worker.dora import DoraScales, Scales
from tests.service.worker.test_cpu_kernels import (
    BASE,
    INPUTS,
    OUTPUTS,
    Layer,
    formula,
    make,
    put,
    schedule,
    wrapper,
)

PARTS = [f"attn.{part}_proj" for part in "qkv"]
BIAS = torch.linspace(-1, 1, sum(OUTPUTS))
ROWS = {
    "in runs": [0, 0, 2, 2, 2, BASE, 1],
    "in turns": [0, 2, BASE, 1, 0, 2, 1, 0, BASE, 2, 0, 1],
    "none": [BASE] * 4,
}


def scaled(dtype: torch.dtype = torch.float32) -> tuple[Any, DoraScales, Any]:
    """(kernels, scales, the one layer, whose bias is BIAS)."""
    kernels, layer = wrapper(), Layer(torch.float32)
    kernels.adopt(layer)
    base = SimpleNamespace(skip_bias_add=False, bias=BIAS.to(dtype))
    layer.punica_wrapper, layer.base_layer = kernels, base  # type: ignore[attr-defined]
    tables = SimpleNamespace(
        model=object(), modules={"attn.qkv_proj": layer}, packed_modules={"attn.qkv_proj": PARTS}
    )
    return kernels, DoraScales(tables), layer


def of(seed: int) -> Scales:
    """For two of the three parts."""
    generator = torch.Generator().manual_seed(seed)
    return {
        part: 1 + torch.rand(n, generator=generator)
        for part, n in list(zip(PARTS, OUTPUTS, strict=True))[:: 2 if seed % 2 else 1][:2]
    }


def run(kernels: Any, layer: Any, y: torch.Tensor, x: torch.Tensor) -> None:
    kernels.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, OUTPUTS)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapters_own_rows_are_multiplied_without_the_bias(rows: str, dtype: torch.dtype) -> None:
    kernels, scales, layer = scaled(dtype)
    generator, tokens = torch.Generator().manual_seed(1), ROWS[rows]
    adapters = [make(4, generator) for _ in range(3)]
    of_slot = {0: of(0), 1: {}, 2: of(1)}
    for slot, adapter in enumerate(adapters):
        put(layer, slot, adapter)
        scales.fill(slot, of_slot[slot])
    schedule(kernels, tokens)
    x = torch.randn(len(tokens), INPUTS, generator=generator).to(dtype)
    y = torch.randn(len(tokens), sum(OUTPUTS), generator=generator).to(dtype)
    want, bias = formula(y, x, tokens, adapters), BIAS.to(dtype).double()
    for row, slot in enumerate(tokens):
        column = 0
        for part, n in zip(PARTS, OUTPUTS, strict=True):
            here = slice(column, column + n)
            if (factors := of_slot.get(slot, {}).get(part)) is not None:
                want[row, here] = (want[row, here] - bias[here]) * factors.double() + bias[here]
            column += n
    run(kernels, layer, y, x)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert torch.allclose(y.double(), want, atol=tolerance, rtol=tolerance)


def test_a_slot_that_another_adapter_gets_is_scaled_no_longer() -> None:
    kernels, scales, layer = scaled()
    rng = torch.Generator().manual_seed(random.Random(0).randrange(99))
    put(layer, 0, [None, None, None])
    scales.fill(0, of(0))
    schedule(kernels, [0, BASE])
    x, y = torch.zeros(2, INPUTS), torch.randn(2, sum(OUTPUTS), generator=rng)
    changed = y.clone()
    run(kernels, layer, changed, x)
    assert not torch.equal(changed[0], y[0])
    assert torch.equal(changed[1], y[1])
    scales.fill(0, {})
    after = y.clone()
    run(kernels, layer, after, x)
    assert torch.equal(after, y)


def test_a_scale_that_fits_no_layer_is_not_passed_over() -> None:
    _, scales, _ = scaled()
    with pytest.raises(ValueError, match="fit no layer"):
        scales.fill(0, {"attn.o_proj": torch.ones(8)})
    with pytest.raises(ValueError, match="has 9 numbers, not 32"):
        scales.fill(0, {"attn.q_proj": torch.ones(9)})

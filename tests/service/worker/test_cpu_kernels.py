"""The CPU's LoRA products against their formula, and against vLLM's own where those are right."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm.lora.layers import LoRAMapping, MergedColumnParallelLinearWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperABC
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from adapters.worker.cpu import kernels as cpu_kernels
from adapters.worker.cpu.kernels import GroupedPunicaWrapper, Groups

SLOTS = 4
MAX_RANK = 16
INPUTS = 24
OUTPUTS = (32, 8, 8)
BASE = -1

Adapter = list[tuple[torch.Tensor, torch.Tensor] | None]
"""(A, B) of each slice, or None where the slice is not adapted."""


class Layer:
    """As much of vLLM's layer as holds weights; ``set_lora`` and ``reset_lora`` are vLLM's."""

    set_lora: Callable[..., None] = MergedColumnParallelLinearWithLoRA.set_lora
    reset_lora: Callable[..., None] = BaseLinearLayerWithLoRA.reset_lora
    n_slices = len(OUTPUTS)
    output_slices = OUTPUTS

    def __init__(self, dtype: torch.dtype, tp_size: int = 1) -> None:
        self.tp_size = tp_size
        # What an earlier adapter left: whoever reads beyond what was set reads this.
        self.lora_a_stacked = tuple(torch.full((SLOTS, 1, MAX_RANK, INPUTS), 7, dtype=dtype) for _ in OUTPUTS)
        self.lora_b_stacked = tuple(torch.full((SLOTS, 1, n, MAX_RANK), 7, dtype=dtype) for n in OUTPUTS)

    def slice_lora_a(self, lora_a: Any) -> Any:
        return lora_a

    slice_lora_b = slice_lora_a


def wrapper(cls: type[PunicaWrapperCPU] = GroupedPunicaWrapper) -> Any:
    return cls(512, 64, torch.device("cpu"))


def schedule(kernels: PunicaWrapperCPU, tokens: list[int], samples: list[int] | None = None) -> None:
    """A step in which row i belongs to slot ``tokens[i]``; engine ids are 100 + slot, 0 for none."""

    def ids(slots: list[int]) -> tuple[int, ...]:
        return tuple(0 if slot == BASE else 100 + slot for slot in slots)

    mapping = LoRAMapping(ids(tokens), ids(tokens if samples is None else samples), is_prefill=True)
    kernels.update_metadata(mapping, [100 + slot for slot in range(SLOTS)], SLOTS, 1000)


def make(rank: int, generator: torch.Generator, targets: tuple[bool, ...] = (True, True, True)) -> Adapter:
    return [
        (torch.randn(rank, INPUTS, generator=generator), torch.randn(n, rank, generator=generator))
        if used
        else None
        for n, used in zip(OUTPUTS, targets, strict=True)
    ]


def put(layer: Layer, slot: int, adapter: Adapter) -> None:
    layer.set_lora(slot, [p and p[0] for p in adapter], [p and p[1] for p in adapter])


def formula(y: torch.Tensor, x: torch.Tensor, tokens: list[int], adapters: list[Adapter]) -> torch.Tensor:
    """y + x Aᵀ Bᵀ, row by row, in float64."""
    want = y.double().clone()
    for row, slot in enumerate(tokens):
        column = 0
        for size, part in zip(OUTPUTS, adapters[slot] if slot >= 0 else [None] * 3, strict=True):
            if part is not None:
                a, b = (weights.double() for weights in part)
                want[row, column : column + size] += b @ (a @ x[row].double())
            column += size
    return want


def batches(rng: random.Random) -> dict[str, list[int]]:
    any_slot = [BASE, *range(SLOTS)]
    return {
        "one slot": [2] * 9,
        "base": [BASE] * 5,
        "one token": [3],
        "prefill": [s for s in rng.sample(any_slot, 4) for _ in range(rng.randint(1, 40))],
        "decode": [rng.choice(any_slot) for _ in range(16)],
        "decode, no base": [rng.randrange(SLOTS) for _ in range(16)],
        "both": [rng.choice(any_slot) for _ in range(12)] + [1] * 30 + [BASE] * 9 + [0] * 4,
        "twice": [1, 1, BASE, 0, 0, 0, 1, 1],
    }


@pytest.mark.parametrize("tp_size", [1, 2], ids=["in place", "copied"])
@pytest.mark.parametrize("faster", [True, False], ids=["rounded", "as they are"])
@pytest.mark.parametrize(
    ("dtype", "weights", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 2e-2),
        (torch.bfloat16, torch.bfloat16, 2e-2),
    ],
    ids=["float32", "bfloat16", "all bfloat16"],
)
@pytest.mark.parametrize("seed", range(4))
def test_the_formula(
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    dtype: torch.dtype,
    weights: torch.dtype,
    tolerance: float,
    faster: bool,
    tp_size: int,
) -> None:
    """Adapters of all ranks and targets in the slots, all kinds of batches; the base's rows bit for bit."""
    monkeypatch.setattr(cpu_kernels, "_faster", lambda dtype: faster and dtype is torch.bfloat16)
    monkeypatch.setattr(cpu_kernels, "WIDE_ROWS", 9)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    layer, kernels = Layer(weights, tp_size), wrapper()
    kernels.adopt(layer)
    targets = [(True, True, True), (True, False, True), (False, True, False), (False, False, False)]
    adapters = [make(rng.choice((1, 4, 8, MAX_RANK)), generator, t) for t in rng.sample(targets, SLOTS)]
    adapters = [[p and (p[0].to(weights), p[1].to(weights)) for p in adapter] for adapter in adapters]
    for slot, adapter in enumerate(adapters):
        put(layer, slot, adapter)
    for name, tokens in batches(rng).items():
        schedule(kernels, tokens)
        # Wider and longer than what is touched, as buffers of a server may be.
        x = torch.randn(len(tokens), INPUTS, generator=generator).to(dtype)
        before = torch.randn(len(tokens) + 3, sum(OUTPUTS) + 5, generator=generator).to(dtype)
        after = before.clone()
        y = after[: len(tokens)]
        kernels.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, OUTPUTS)
        want = formula(before[: len(tokens)], x, tokens, adapters)
        size = want.abs().max()
        assert (y.double() - want).abs().max() <= tolerance * size, name
        base = [row for row, slot in enumerate(tokens) if slot == BASE]
        assert torch.equal(after[base], before[base]), name
        assert torch.equal(after[len(tokens) :], before[len(tokens) :]), name
        assert torch.equal(after[:, sum(OUTPUTS) :], before[:, sum(OUTPUTS) :]), name


@pytest.mark.parametrize("tp_size", [1, 2], ids=["in place", "copied"])
def test_a_slot_forgets_its_last_adapter(tp_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    layer, kernels = Layer(torch.float32, tp_size), wrapper()
    kernels.adopt(layer)
    x = torch.randn(3, INPUTS, generator=generator)
    schedule(kernels, [0, 0, 0])

    def answer() -> torch.Tensor:
        y = torch.zeros(3, sum(OUTPUTS))
        kernels.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, OUTPUTS)
        return y

    for adapter in (make(16, generator), make(4, generator, (True, False, True)), make(8, generator)):
        put(layer, 0, adapter)
        want = formula(torch.zeros(3, sum(OUTPUTS)), x, [0, 0, 0], [adapter])
        assert torch.allclose(answer().double(), want, atol=1e-4)
    layer.reset_lora(0)
    assert not answer().any()


def test_only_the_adapters_own_ranks_are_read() -> None:
    generator = torch.Generator().manual_seed(2)
    layer, kernels = Layer(torch.float32, tp_size=2), wrapper()
    kernels.adopt(layer)
    put(layer, 1, make(4, generator))
    for weights in layer.lora_a_stacked:
        weights[1, 0, 4:] = torch.nan
    for weights in layer.lora_b_stacked:
        weights[1, 0, :, 4:] = torch.nan
    schedule(kernels, [1] * 3)
    y = torch.zeros(3, sum(OUTPUTS))
    x = torch.randn(3, INPUTS, generator=generator)
    kernels.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, OUTPUTS)
    assert y.isfinite().all()


def test_a_slot_takes_no_memory_of_its_own() -> None:
    layer, kernels = Layer(torch.float32), wrapper()
    kernels.adopt(layer)
    before = [weights.clone() for weights in (*layer.lora_a_stacked, *layer.lora_b_stacked)]
    adapter = make(4, torch.Generator().manual_seed(5))
    put(layer, 1, adapter)
    after = (*layer.lora_a_stacked, *layer.lora_b_stacked)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("side", [0, 1])
def test_what_does_not_fit_a_slot_is_refused_before_a_step(side: int) -> None:
    layer, kernels = Layer(torch.float32), wrapper()
    kernels.adopt(layer)
    adapter = make(4, torch.Generator().manual_seed(6))
    pair = adapter[1]
    assert pair is not None
    adapter[1] = (pair[0].repeat(1, 2), pair[1]) if side == 0 else (pair[0], pair[1].repeat(2, 1))
    with pytest.raises(RuntimeError, match="must match"):
        put(layer, 1, adapter)


@pytest.mark.parametrize("tokens", [[2] * 7, [0, 0, 3, 3, 3, 1, 2], [0, 1, 2, 3, 0, 1, 2]], ids=str)
def test_what_vllm_computes(tokens: list[int]) -> None:
    """All five products, for layers that were not adopted; vLLM's own are right where each row has a slot."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    a = tuple(randn(SLOTS, 1, MAX_RANK, INPUTS) for _ in OUTPUTS)
    b = tuple(randn(SLOTS, 1, n, MAX_RANK) for n in OUTPUTS)
    x, narrow = randn(len(tokens), INPUTS), randn(3, len(tokens), MAX_RANK)
    samples = tokens[::2]
    results = []
    for kernels in (wrapper(), wrapper(PunicaWrapperCPU)):
        schedule(kernels, tokens, samples)
        linear, expanded = torch.ones(len(tokens), sum(OUTPUTS)), torch.ones(len(tokens), 60)
        replaced, embedded = torch.ones(len(tokens), sum(OUTPUTS)), torch.ones(len(tokens), OUTPUTS[0])
        shrunk, logits = torch.zeros(3, len(tokens), MAX_RANK), torch.ones(len(samples), OUTPUTS[0] - 3)
        kernels.add_lora_linear(linear, x, a, b, 0.5, OUTPUTS)
        kernels.add_shrink(shrunk, x, a, 0.5)
        kernels.add_expand(expanded, narrow, b, OUTPUTS, offset_start=5, add_inputs=True)
        kernels.add_expand(replaced, narrow, b, OUTPUTS, add_inputs=False)
        kernels.add_lora_embedding(embedded, narrow[0], b[0], add_inputs=True)
        kernels.add_lora_logits(logits, x[::2], a[0], b[0], 0.5)
        results.append((linear, shrunk, expanded, replaced, embedded, logits))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_rows_without_a_slot_are_left_alone_by_every_product() -> None:
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(SLOTS, 1, MAX_RANK, INPUTS, generator=generator)
    b = torch.randn(SLOTS, 1, 32, MAX_RANK, generator=generator)
    x, narrow = torch.randn(3, INPUTS, generator=generator), torch.randn(1, 3, MAX_RANK, generator=generator)
    kernels = wrapper()
    schedule(kernels, [BASE, 1, BASE])
    outs = [torch.zeros(3, 32), torch.zeros(1, 3, MAX_RANK), *(torch.zeros(3, 32) for _ in range(3))]
    kernels.add_lora_linear(outs[0], x, (a,), (b,), 1.0, (32,))
    kernels.add_shrink(outs[1], x, (a,), 1.0)
    kernels.add_expand(outs[2], narrow, (b,), (32,))
    kernels.add_lora_embedding(outs[3], narrow[0], b)
    kernels.add_lora_logits(outs[4], x, a, b, 1.0)
    for out in outs:
        rows = out.view(3, -1)
        assert rows[1].all()
        assert not rows[0].any()
        assert not rows[2].any()


def test_groups() -> None:
    assert Groups.of([]) == Groups.of([BASE, BASE]) == Groups(())
    assert Groups.of([1, 1, 1]).runs == ((1, 0, 3),)
    assert Groups.of([BASE, 2, 2, 0, BASE]).runs == ((2, 1, 3), (0, 3, 4))
    assert Groups.of([1, 0, 1, 0]).order is None
    sorted_ = Groups.of([1, BASE, 0, 1, 0, 1])
    assert sorted_.runs == ((0, 0, 2), (1, 2, 5))
    assert sorted_.order is not None
    assert sorted_.place is not None
    assert sorted_.order.tolist() == [2, 4, 0, 3, 5]
    assert sorted_.place.tolist() == [2, 5, 0, 3, 1, 4]


def test_vllms_interface_is_the_one_we_know() -> None:
    ours = {
        name: method
        for name, method in vars(GroupedPunicaWrapper).items()
        if inspect.isfunction(method) and hasattr(PunicaWrapperCPU, name) and not name.startswith("__")
    }
    for name, method in ours.items():
        known = inspect.signature(getattr(PunicaWrapperCPU, name)).parameters
        assert list(inspect.signature(method).parameters) == list(known), name
    # Everything that a wrapper must have is ours, but for classifiers, which Loraplex does not serve.
    assert PunicaWrapperABC.__abstractmethods__ - ours.keys() == {"apply_lora_full_linear"}

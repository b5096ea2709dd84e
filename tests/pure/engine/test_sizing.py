"""Sizing: its arithmetic, and the layers that it counts."""

from __future__ import annotations

import random
from typing import Any

import pytest
import transformers

from server.engine import sizing
from server.engine.layers import lora_layers
from server.engine.sizing import EngineCapacity, Layer, Split

LLAMA_VOCABULARY = ("embed_tokens", "lm_head")
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SIZES = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def layers_of(config: Any, **changes: Any) -> list[Layer]:
    return lora_layers(config, **({"vocabulary": (), "fused": FUSED, "targets": None} | changes))


def totals(layers: list[Layer]) -> list[tuple[int, int]]:
    return sorted((layer.inputs, layer.outputs) for layer in layers)


# --- which layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_layers_of_a_dense_model(name: str, tied: bool) -> None:
    config = getattr(transformers, f"{name}Config")(**SIZES, tie_word_embeddings=tied)
    linear = [(64, 64), (64, 16), (64, 16), (64, 64), (64, 96), (64, 96), (96, 64)] * 2
    assert totals(layers_of(config)) == sorted(linear)
    with_vocabulary = layers_of(config, vocabulary=LLAMA_VOCABULARY)
    assert totals(with_vocabulary) == sorted([*linear, (64, 160), (64, 160)])
    assert all(layer.served for layer in with_vocabulary)


def test_workers_that_share_a_model_serve_no_vocabulary() -> None:
    layers = layers_of(transformers.LlamaConfig(**SIZES), vocabulary=LLAMA_VOCABULARY, workers=2)
    assert [layer.outputs for layer in layers if not layer.served] == [160, 160]


def test_how_workers_share_them() -> None:
    shared = layers_of(transformers.LlamaConfig(**SIZES), workers=4)
    one = [
        Layer(64, 64, "column"), Layer(64, 16, "column", 8), Layer(64, 16, "column", 8), Layer(64, 64, "row"),
        Layer(64, 96, "column"), Layer(64, 96, "column"), Layer(96, 64, "row"),
    ]  # fmt: skip
    assert shared == one * 2


@pytest.mark.parametrize(
    ("targets", "counted"),
    [
        (["o_proj"], [(64, 64)] * 2),
        (["q_proj"], [(64, 64), (64, 16), (64, 16)] * 2),  # vLLM has one layer of all three
        (["qkv_proj", "down_proj"], [(64, 64), (64, 16), (64, 16), (96, 64)] * 2),
        (["model.layers.1.mlp.down_proj"], [(96, 64)]),
        (["o_proj", "lm_head"], [(64, 64), (64, 64), (64, 160)]),
    ],
)
def test_only_the_targets_where_there_are_any(targets: list[str], counted: list[tuple[int, int]]) -> None:
    config = transformers.LlamaConfig(**SIZES)
    assert totals(layers_of(config, vocabulary=LLAMA_VOCABULARY, targets=targets)) == sorted(counted)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_layers_of_a_mixture_and_what_workers_keep_of_its_experts(workers: int) -> None:
    config = transformers.Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=48)
    layers = layers_of(config, workers=workers)
    attention = [(64, 64), (64, 16), (64, 16), (64, 64)]
    experts = [(64, 48), (64, 48), (48, 64)] * 4
    assert totals(layers) == sorted([*attention, (64, 4), *experts] * 2)
    whole = [layer for layer in layers if not layer.cut]
    assert totals(whole) == sorted(experts * 2)
    size = {"rank": 8, "itemsize": 2}
    kept = sizing.entry_bytes(whole, **size, workers=workers)
    assert kept == workers * sizing.entry_bytes(whole, **size), "experts are whole on each worker"


@pytest.mark.parametrize("name", ["Qwen2Moe", "GptOss", "Mamba2", "GPT2", "CLIPText"])
def test_what_cannot_be_told_is_refused(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(num_hidden_layers=1)
    with pytest.raises(ValueError, match="give GPU_SLOTS and HOST_SLOTS as numbers"):
        layers_of(config)


def test_a_model_without_a_plan_for_several_workers_is_refused() -> None:
    config = transformers.OPTConfig(num_hidden_layers=1)
    assert layers_of(config, workers=1)
    with pytest.raises(ValueError, match="how several workers share"):
        layers_of(config, workers=2)


def test_targets_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="no layer that LoRA is served on"):
        layers_of(transformers.LlamaConfig(**SIZES), targets=["nothing"])


# --- how many ---------------------------------------------------------------------------------------


def some_layers(rng: random.Random) -> list[Layer]:
    splits: list[Split] = ["column", "row", "none"]
    made = []
    for _ in range(rng.randint(1, 9)):
        inputs, outputs = (8 * rng.randint(1, 500) for _ in range(2))
        made.append(Layer(inputs, outputs, rng.choice(splits), served=rng.random() < 0.8))
    return made


@pytest.mark.parametrize("seed", range(50))
def test_sizes_scale_as_they_must(seed: int) -> None:
    rng = random.Random(seed)
    layers = some_layers(rng)
    size = {"rank": rng.choice([8, 16, 64]), "itemsize": rng.choice([2, 4])}
    whole = sizing.slot_bytes(layers, **size)
    assert whole == sum((y.inputs + y.outputs) * size["rank"] * size["itemsize"] for y in layers)
    for workers in (2, 4, 8):
        half = sizing.slot_bytes(layers, **size, workers=workers)
        full = sizing.slot_bytes(layers, **size, workers=workers, fully_sharded=True)
        assert whole / workers <= full <= half <= whole
        assert workers * half >= whole, "together they hold all of it"
        one = sizing.entry_bytes(layers, **size)
        assert sizing.entry_bytes(layers, **size, workers=workers, shards=False) == workers * one
        assert one <= sizing.entry_bytes(layers, **size, workers=workers) <= workers * one
        divided = [layer for layer in layers if layer.split != "none"]
        assert sizing.entry_bytes(divided, **size, workers=workers, fully_sharded=True) == sizing.entry_bytes(
            divided, **size
        ), "one copy, whoever has it"
    assert sizing.entry_bytes(layers, **size) <= whole
    assert sizing.slot_bytes(layers, rank=2 * size["rank"], itemsize=size["itemsize"]) == 2 * whole


@pytest.mark.parametrize("seed", range(50))
def test_counts_stay_within_memory_and_within_reason(seed: int) -> None:
    rng = random.Random(seed)
    slot, entry, most = rng.randint(1, 1 << 30), rng.randint(1, 1 << 30), rng.randint(1, 300)
    gpu_memory, host_memory = (rng.randint(0, 1 << rng.randint(20, 38)) for _ in range(2))
    gpu = sizing.gpu_slots(gpu_memory, slot, most)
    assert 1 <= gpu <= most
    assert gpu == 1 or gpu * slot <= gpu_memory
    assert gpu == most or (gpu + 1) * slot > gpu_memory
    host = sizing.host_slots(host_memory, entry, gpu)
    assert host >= gpu
    assert host == gpu or host * entry <= host_memory
    assert (host + 1) * entry > host_memory
    assert sizing.gpu_slots(2 * gpu_memory, slot, most) >= gpu
    assert sizing.host_slots(2 * host_memory, entry, gpu) >= host


def test_workers_that_cannot_share_a_layer_are_named() -> None:
    with pytest.raises(ValueError, match="3 workers cannot share 64 evenly"):
        sizing.slot_bytes([Layer(64, 64, "column")], rank=8, itemsize=2, workers=3)


def test_the_line_for_the_operator() -> None:
    line = EngineCapacity(4, 16, slot_bytes=50 << 20, entry_bytes=40 << 20).describe(1 << 30, 2 << 30)
    assert line == (
        "a GPU slot takes 50 MiB on each worker: 4 slots, 200 MiB; 20 fit in adapter_gpu_memory, 1 GiB."
        " A host entry takes up to 40 MiB: 16 entries, 640 MiB; 51 fit in adapter_host_memory, 2 GiB."
    )


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (999, "999 B"), (1023, "0.999 KiB"), (1536, "1.5 KiB"), (5 << 40, "5 TiB")],
)
def test_sizes_are_shown_shortly(size: int, shown: str) -> None:
    assert sizing.in_units(size) == shown


def test_a_classifiers_head_is_counted_whole() -> None:
    assert sizing.head_bytes(64, 4096, itemsize=2, bias_itemsize=4) == 64 * 4096 * 2 + 64 * 4
    assert sizing.head_bytes(0, 4096, itemsize=2, bias_itemsize=4) == 0

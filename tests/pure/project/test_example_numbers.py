"""The numbers in ``config/llama-70b.yaml`` and of shared slots, computed again from the models' shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
import yaml

from adapters.worker.ranges import RankRanges
from server.engine import sizing
from server.engine.layers import lora_layers
from server.engine.sharding import LAYERS, divides_in_full, layers_served
from server.engine.sizing import Layer
from tests.pure.engine.test_sizing import FUSED

FILE = Path(__file__).parents[3] / "config" / "llama-70b.yaml"
ITEM = 2  # bytes of bfloat16
DEPTH = 80
# Of one of its layers; the others are the same.
LLAMA_70B = transformers.LlamaConfig(
    vocab_size=128_256,
    hidden_size=8192,
    intermediate_size=28_672,
    num_hidden_layers=1,
    num_attention_heads=64,
    num_key_value_heads=8,
)


@pytest.fixture(scope="module")
def layers() -> list[Layer]:
    found = lora_layers(
        LLAMA_70B, vocabulary=("embed_tokens", "lm_head"), fused=FUSED, targets=LAYERS, workers=4
    )
    return found * DEPTH


def slot(layers: list[Layer], rank: int = 32, *, fully: bool = True) -> float:
    return sizing.slot_bytes(layers, rank=rank, itemsize=ITEM, workers=4, fully_sharded=fully)


def entries(layers: list[Layer], rank: int, *, fully: bool = True, shards: bool = True) -> str:
    """What 50 of them take in the memory of the host."""
    one = sizing.entry_bytes(layers, rank=rank, itemsize=ITEM, workers=4, fully_sharded=fully, shards=shards)
    return f"{50 * one / 1e9:.0f} GB"


def test_its_comments_say_what_is_so(layers: list[Layer]) -> None:
    text, settings = FILE.read_text(), yaml.safe_load(FILE.read_text())
    assert (settings["max_lora_rank"], settings["gpu_slots"], settings["host_slots"]) == (32, 16, 50)
    assert settings["engine_args"]["tensor_parallel_size"] == 4
    assert "fully_sharded_loras" not in settings["engine_args"], "it is so by itself"
    config, given = LLAMA_70B.to_dict(), settings["engine_args"]
    assert divides_in_full(config, given, rank=settings["max_lora_rank"])
    assert layers_served(config, given, shared=False) == list(LAYERS)
    per_layer = sum(layer.inputs + layer.outputs for layer in layers) // DEPTH
    adapter = sizing.entry_bytes(layers, rank=1, itemsize=ITEM)
    kv_token = 2 * DEPTH * 8 * 128 * ITEM // 4  # keys and values of a GPU's two heads
    for said in (
        f"{per_layer:,} a layer x {DEPTH} layers x {ITEM} bytes = {adapter / 1e6:.1f} MB",
        f"an adapter of rank 16 is {16 * adapter / 1e6:.0f} MB, of rank 32 {32 * adapter / 1e6:.0f} MB",
        f"{adapter / 1e6:.1f} MB / 4 = {slot(layers) / 32e6:.1f} MB per unit of rank",
        f"{slot(layers) / 1e6:.0f} MB a slot; 16 slots {16 * slot(layers) / 1e9:.1f} GB,"
        f" all 50 in slots {50 * slot(layers) / 1e9:.1f} GB",
        f"({slot(layers, fully=False) / 32e6:.1f} MB per unit of rank)",
        f"rank 16: 50 x {16 * adapter / 1e6:.0f} MB = {entries(layers, 16)}; rank 32: {entries(layers, 32)}",
        f"{entries(layers, 16, shards=False)} and {entries(layers, 32, shards=False)}",
        f"{entries(layers, 16, fully=False)} and {entries(layers, 32, fully=False)}",
        f"at {kv_token:,} bytes a token",
    ):
        assert said in text.replace("\n#  ", ""), said


# --- how many adapters share the slots of a GiB -------------------------------------------------------

LLAMA_8B = transformers.LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=1,
    num_attention_heads=32,
    num_key_value_heads=8,
)
MIXES = {
    "all of rank 8": (8,),
    "all of rank 16": (16,),
    "8, 8, 16, 64 in turn": (8, 8, 16, 64),
    "8, 24, 48, 64 in turn": (8, 24, 48, 64),
    "all of rank 64": (64,),
}


def sharing(slots: int, ranks: tuple[int, ...]) -> int:
    """How many of them, in turn, share so many slots of rank 64."""
    ranges, count = RankRanges(slots, 64), 0
    while ranges.fits(rank := ranks[count % len(ranks)]):
        ranges.add(count, rank)
        count += 1
    return count


def test_the_table_of_adapters_per_gib() -> None:
    layers = lora_layers(LLAMA_8B, vocabulary=("embed_tokens", "lm_head"), fused=FUSED, targets=None)
    once = [y for y in layers if LLAMA_8B.vocab_size in (y.inputs, y.outputs)]
    whole = [y for y in layers if y not in once] * 32 + once
    slots, common = (
        4 * 2**30 // sizing.slot_bytes(room, rank=64, itemsize=ITEM)
        for room in (
            whole,
            [y for y in whole if y not in once],
        )  # what shares slots has none for the vocabulary
    )
    text = (FILE.parents[1] / "docs" / "benchmarks.md").read_text()
    for name, ranks in MIXES.items():
        shared = sharing(common, ranks)
        assert f"| {name} | {slots / 4:.2f} | {shared / 4:.2f} | {shared / slots:.1f} × |" in text

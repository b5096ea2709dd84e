"""What a slot and an entry were computed to take, against what vLLM itself allocates, on eight bases.

vLLM's own model of each base, and its own layers for adapters, with as many workers as are asked for, on
torch's meta device: the shapes of every tensor, and no memory. ``docs/benchmarks.md`` has the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.platforms import current_platform

from adapters.worker.dora_gpu import tables_bytes
from adapters.worker.scheduler import DORA
from server.engine import arguments, sizing
from server.engine.arguments import Slots
from server.engine.sharding import DIVIDED, LAYERS
from server.settings import Settings
from tests.service.worker.test_dora_gpu import DoraRowsOnCPU, vllms_layers_as_before
from tests.support.quantized import KINDS

DOCS = Path(__file__).parents[3] / "docs" / "benchmarks.md"
RANK, SLOTS = 64, 2
ITEM = 2  # bytes of bfloat16
WITHIN = 0.02


@dataclass(frozen=True)
class Base:
    """A model that people serve, by its shapes; ``experts`` are counted by what vLLM makes of a layer."""

    title: str
    model: str
    hidden: int
    inner: int
    depth: int
    heads: tuple[int, int]
    words: int
    tied: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        return {
            "model_type": self.model,
            "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model]],
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.heads[0],
            "num_key_value_heads": self.heads[1],
            "vocab_size": self.words,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 4096,
            "dtype": "bfloat16",
            **self.more,
        }


EIGHT_BILLION = ("llama", 4096, 14_336, 32, (32, 8), 128_256)
BASES = (
    Base("Llama 3.1 8B", *EIGHT_BILLION),
    Base("Llama 3.1 8B, w4a16", *EIGHT_BILLION, more={"quantization_config": KINDS["w4a16"][0]}),
    Base("Llama 3.2 1B, tied", "llama", 2048, 8192, 16, (32, 8), 128_256, tied=True),
    Base("SmolLM2 1.7B, tied", "llama", 2048, 8192, 24, (32, 32), 49_152, tied=True),
    Base("Qwen2.5 7B", "qwen2", 3584, 18_944, 28, (28, 4), 152_064),
    Base("Qwen2.5 0.5B, tied", "qwen2", 896, 4864, 24, (14, 2), 151_936, tied=True),
    Base("Mixtral 8x7B", "mixtral", 4096, 14_336, 32, (32, 8), 32_000, more={"num_local_experts": 8}),
    Base(
        "Qwen3 30B A3B",
        "qwen3_moe",
        2048,
        6144,
        48,
        (32, 4),
        151_936,
        more={
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        },
    ),
)


def experts_alone(self: Any, base_layer: Any) -> None:
    """As much of vLLM's layer as says how large its tensors are: on a CPU it has no kernel for the rest."""
    from vllm.lora.layers.base import BaseLayerWithLoRA

    BaseLayerWithLoRA.__init__(self)
    self.base_layer, self.moe_config = base_layer, base_layer.moe_config
    parallel = self.moe_config.moe_parallel_config
    self.tp_size, self.tp_rank = parallel.tp_size, parallel.tp_rank
    self.device = torch.device("meta")
    self._w13_slices = 2


@pytest.fixture(autouse=True)
def vllms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora.layers import FusedMoEWithLoRA, base_linear
    from vllm.lora.layers.base import BaseLayerWithLoRA
    from vllm.model_executor.models import registry

    from adapters.worker.cpu.packed import know_the_device

    monkeypatch.setattr(FusedMoEWithLoRA, "__init__", experts_alone)
    monkeypatch.setattr(FusedMoEWithLoRA, "set_mapping", BaseLayerWithLoRA.set_mapping)
    monkeypatch.setattr(base_linear, "_get_lora_device", base_linear._get_lora_device)
    know_the_device()
    # What a class can do is asked of it here; another process for each takes ten seconds.
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda ask: ask())


@contextmanager
def engine_config(base: Base, folder: Path, workers: int, fully: bool, **engine_args: Any) -> Iterator[Any]:
    """What the product would start vLLM with."""
    from vllm.config import set_current_vllm_config

    (folder / "config.json").write_text(json.dumps(base.config))
    settings = Settings(
        model=str(folder),
        max_lora_rank=RANK,
        max_model_len=64,
        engine_args={
            "dtype": "bfloat16",
            "lora_dtype": "bfloat16",
            "enforce_eager": True,
            "tensor_parallel_size": workers,
            "fully_sharded_loras": fully,
            **engine_args,
        },
    )
    _, engine_args = arguments.vllm_arguments(settings, Slots(SLOTS, SLOTS))
    engine_args.skip_tokenizer_init = True
    config = engine_args.create_engine_config()
    with set_current_vllm_config(config):
        yield config


def adapted(config: Any, workers: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The layers that take adapters on the first of so many workers, by their names, by vLLM's own code."""
    from vllm.distributed import parallel_state
    from vllm.lora.layers import BaseLayerWithLoRA
    from vllm.lora.model_manager import LRUCacheLoRAModelManager
    from vllm.model_executor.models import ModelRegistry

    alone = SimpleNamespace(
        world_size=1,
        rank_in_group=0,
        is_first_rank=True,
        is_last_rank=True,
        device_group=SimpleNamespace(size=lambda: 1, rank=lambda: 0),
    )
    for group in ("_PP", "_DP", "_PCP", "_EP"):
        monkeypatch.setattr(parallel_state, group, alone, raising=False)
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    tensor = SimpleNamespace(world_size=workers, rank_in_group=0, device_group=group, cpu_group=group)
    monkeypatch.setattr(parallel_state, "_TP", tensor)
    kind, _ = ModelRegistry.resolve_model_cls(config.model_config.architectures, config.model_config)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = kind(vllm_config=config)
            words = config.model_config.get_vocab_size()
            LRUCacheLoRAModelManager(model, 8, 64, words, config.lora_config, torch.device("meta"), config)
    finally:
        torch.set_default_dtype(dtype)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseLayerWithLoRA)}


def allocated(layers: dict[str, Any]) -> int:
    """Bytes of a slot of these."""
    sides = [side for layer in layers.values() for side in (layer.lora_a_stacked, layer.lora_b_stacked)]
    tensors = [t for side in sides for t in (side if isinstance(side, tuple | list) else [side])]
    return sum(t.nbytes for t in tensors) // SLOTS


def size(
    base: Base, folder: Path, workers: int, fully: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, int]:
    """(computed, allocated)."""
    with engine_config(base, folder, workers, fully) as config:
        layers = arguments._slot_layers(config)
        computed = sizing.slot_bytes(layers, rank=RANK, itemsize=ITEM, workers=workers, fully_sharded=fully)
        return computed, allocated(adapted(config, workers, monkeypatch))


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.title)
def test_a_slot_takes_what_was_computed(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (size(base, tmp_path, n, n > 1, monkeypatch) for n in (1, 2))
    for computed, found in (one, two):
        assert abs(computed - found) <= WITHIN * found
    row = " | ".join(f"{number / 2**20:,.1f}" for number in (*one, *two))
    assert f"| {base.title} | {row} |" in DOCS.read_text()


def test_the_scales_of_doras_take_what_was_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the slots, where an engine on a GPU serves DoRA."""
    wrapper = f"{DoraRowsOnCPU.__module__}.{DoraRowsOnCPU.__qualname__}"
    monkeypatch.setattr(current_platform, "get_punica_wrapper", lambda: wrapper, raising=False)
    with (
        vllms_layers_as_before(),
        engine_config(BASES[2], tmp_path, 1, False, additional_config={DORA: 1}) as config,
    ):
        layers = arguments._slot_layers(config)
        found = adapted(config, 1, monkeypatch)
        assert sizing.dora_bytes(layers) == sum(tables_bytes(layer) for layer in found.values())
    assert sizing.dora_bytes(layers) == 16 * 4 * (2048 + 2 * 512 + 2048 + 2 * 8192 + 2048)


@pytest.mark.parametrize("model", sorted(DIVIDED))
def test_what_is_divided_in_full_takes_the_same_adapters(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No linear layer of a base that two workers divide by default is left out, and a slot is smaller."""
    small = Base(model, model, 64, 128, 1, (4, 2), 256, more={"head_dim": 16, "pad_token_id": 0})
    found = {}
    for fully in (False, True):
        with engine_config(small, tmp_path, 2, fully) as config:
            found[fully] = adapted(config, 2, monkeypatch)
    assert found[True].keys() == found[False].keys()
    assert {name.rpartition(".")[2] for name in found[True]} == {*LAYERS}, "and not the vocabulary"
    assert allocated(found[True]) < 0.8 * allocated(found[False])

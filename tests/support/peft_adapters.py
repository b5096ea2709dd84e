"""A small llama, and adapters for it that PEFT itself writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.model import CONFIG_FILE, WEIGHTS_FILE, BaseModel, ModuleShape

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q0 = "model.layers.0.self_attn.q_proj"
K1 = "model.layers.1.self_attn.k_proj"
A0 = f"base_model.model.{Q0}.lora_A.weight"
B0 = f"base_model.model.{Q0}.lora_B.weight"

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=112,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    model.config._name_or_path = "acme/tiny-llama"
    model.name_or_path = "acme/tiny-llama"
    return model


@pytest.fixture(scope="module")
def base() -> BaseModel:
    modules = {
        name: ModuleShape(layer.in_features, layer.out_features)
        for name, layer in make_llama().named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }
    assert len(modules) == 14
    return BaseModel(
        name="acme/tiny-llama",
        modules=modules,
        max_lora_rank=16,
        fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
    )


def train(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Writes an adapter with PEFT; lora_B is random instead of trained."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(make_llama(), LoraConfig(**(options | config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter).mul(0.1).to(dtype)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("good"))


def write(folder: Path, config: Config, tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    return folder


def read(folder: Path) -> tuple[Config, Tensors]:
    return json.loads((folder / CONFIG_FILE).read_text()), load_file(folder / WEIGHTS_FILE)

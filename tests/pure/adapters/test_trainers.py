"""The configs that trainers write, made by the installed PEFT from the very arguments that they give it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from adapters.inspection.admit import admit
from adapters.inspection.base_model import read_base
from adapters.model import CONFIG_FILE, BaseModel
from tests.support.peft_adapters import make_llama
from tests.support.trainer import draw

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Of Axolotl 0.21 (``loaders/adapter.py``), for its example of a QLoRA: what is not said in its YAML is None.
AXOLOTL: dict[str, Any] = {
    "r": 32,
    "lora_alpha": 16,
    "target_modules": LINEAR,
    "target_parameters": [],
    "layers_to_transform": None,
    "layers_pattern": None,
    "lora_dropout": 0.05,
    "fan_in_fan_out": None,
    "modules_to_save": None,
    "exclude_modules": None,
    "bias": "none",
    "task_type": "CAUSAL_LM",
}
TRAINERS: dict[str, dict[str, Any]] = {
    # Of its guide to quantization.
    "PEFT, a QLoRA": {
        "r": 16,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "lora_dropout": 0.05,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    },
    "PEFT, a QLoRA on all layers": {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
    "Axolotl": AXOLOTL,
    "Axolotl, some layers": AXOLOTL | {"layers_to_transform": [0], "layers_pattern": None},
    "Axolotl, rsLoRA and patterns": AXOLOTL
    | {"use_rslora": True, "rank_pattern": {"k_proj": 8}, "alpha_pattern": {"up_proj": 32}},
    # Of its ``llamafactory/model/adapter.py``.
    "LLaMA-Factory": {
        "task_type": "CAUSAL_LM",
        "inference_mode": False,
        "r": 8,
        "target_modules": LINEAR,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("base")
    make_llama().save_pretrained(folder)
    return read_base(folder, max_lora_rank=32)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_a_trainer_writes_is_taken_as_it_is(trainer: str, base: BaseModel, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = get_peft_model(make_llama(), LoraConfig(**TRAINERS[trainer]))
    draw(model, of="lora_B")
    model.save_pretrained(tmp_path)
    manifest = admit(tmp_path, base, serving_dtype="float32")
    assert not manifest.conversions
    adapted = {
        name.removeprefix("base_model.model.")
        for name, one in model.named_modules()
        if hasattr(one, "lora_A")
    }
    assert set(manifest.modules) == adapted
    assert manifest.rank == TRAINERS[trainer].get("r", 8)
    if trainer == "Axolotl":
        written = json.loads((tmp_path / CONFIG_FILE).read_text())
        assert written["fan_in_fan_out"] is None
        assert written["target_parameters"] == []

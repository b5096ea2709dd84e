"""An adapter whose weights are finite and which overflows on one token only."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from adapters.model import CONFIG_FILE, WEIGHTS_FILE

_LARGEST = 3.4028e38


def make_overflowing(base: Path, folder: Path) -> int:
    """Writes the adapter for the Llama in ``base`` to ``folder``; returns the token that it overflows on.

    Of rank 1, on the first layer's values: A is the direction in which the chosen token's normalised
    embedding stands out from all others, as far as the covariance of the vocabulary lets it, and B is so
    large that B·A·x overflows float32 for this token and for no other.
    """
    with safe_open(next(base.glob("*.safetensors")), "pt") as file:
        embeddings = file.get_tensor("model.embed_tokens.weight").to(torch.float32).numpy()
        weight = file.get_tensor("model.layers.0.input_layernorm.weight").to(torch.float32).numpy()
        values = file.get_tensor("model.layers.0.self_attn.v_proj.weight").shape[0]
    inputs = embeddings / np.sqrt((embeddings**2).mean(1, keepdims=True) + 1e-5) * weight
    covariance = inputs.T @ inputs / len(inputs) + 1e-3 * np.eye(inputs.shape[1], dtype=np.float32)
    token, direction = _stands_out(inputs, np.linalg.inv(covariance))
    large = 1e38
    b = np.zeros((values, 1), np.float32)
    b[0, 0] = large
    a = (direction * (_LARGEST * 1.1 / large))[None, :].astype(np.float32)
    name = "base_model.model.model.layers.0.self_attn.v_proj"
    folder.mkdir(parents=True)
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, folder / WEIGHTS_FILE)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base.name,
        "task_type": "CAUSAL_LM",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": ["v_proj"],
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return token


def _stands_out(inputs: np.ndarray, inverse: np.ndarray) -> tuple[int, np.ndarray]:
    """(token, d) with d·x = 1 for the token's input, and as far below 1 as a few tries get for all others."""
    found: list[tuple[float, int, np.ndarray]] = []
    first, step = min(1000, len(inputs) // 2), min(37, len(inputs) // 64)
    for token in range(first, len(inputs), step)[:40]:
        direction = inverse @ inputs[token]
        direction = direction / (direction @ inputs[token])
        reach = np.abs(inputs @ direction)
        reach[token] = 0
        found.append((float(reach.max()), token, direction))
    second, token, direction = min(found, key=lambda one: one[0])
    assert second < 0.8, "no token stands out"
    return token, direction

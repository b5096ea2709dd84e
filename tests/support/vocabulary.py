"""Adapters on the head and the embedding, as PEFT saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from tests.support.trainer import SIZES, Base, build, draw

BOTH = ("lm_head", "embed_tokens")


def make_llama(folder: Path, *, tied: bool) -> Base:
    return build(LlamaConfig(**SIZES, tie_word_embeddings=tied), folder)


def train(base: Base, targets: tuple[str, ...], folder: Path, **options: Any) -> Any:
    """PEFT's model after random steps, saved in ``folder`` with what PEFT saves beside it by default."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM", **options)
    model = get_peft_model(base.fresh(), config)
    draw(model)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    return model.eval()

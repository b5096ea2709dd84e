"""Trains the demo's three adapters: ``python -m server.demo.train --out config/demo``.

Each customer's examples lie in ``config/demo/<name>.jsonl``, one ``{"prompt", "answer"}`` a line.
Ranks and target modules differ on purpose, as customers' adapters do. Deterministic: fixed seeds,
and the order of the batches depends on nothing else. Under a minute an adapter on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.demo.base import BASE_NAME, CHECKOUT, cache_folder, prepare

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries below are first imported

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

EXAMPLES = CHECKOUT / "config" / "demo"
BATCH = 4
EPOCHS = 4
LEARNING_RATE = 2e-3  # at the first step, falling to zero
IGNORED = -100  # torch's label of a token that does not count


@dataclass(frozen=True)
class Recipe:
    """What is special about one customer's adapter."""

    name: str
    rank: int
    target_modules: tuple[str, ...]


RECIPES = (
    Recipe("acme", rank=8, target_modules=("q_proj", "v_proj")),
    Recipe("bluebird", rank=16, target_modules=("v_proj",)),
    Recipe("corvus", rank=4, target_modules=("q_proj", "k_proj", "v_proj", "o_proj")),
)


def load_examples(name: str) -> list[tuple[str, str]]:
    """(prompt, answer) pairs of one customer."""
    lines = (EXAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["prompt"], row["answer"]) for row in map(json.loads, lines)]


def encode(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of the whole conversation, and its labels: only the answer and its end count."""
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )
    answered = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return asked + answered, [IGNORED] * len(asked) + answered


def collate(rows: list[tuple[list[int], list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """Padded on the right: ``input_ids``, ``attention_mask`` and ``labels``, each (rows, longest)."""
    longest = max(len(ids) for ids, _ in rows)
    gaps = [longest - len(ids) for ids, _ in rows]
    return {
        "input_ids": torch.tensor([ids + [pad] * gap for (ids, _), gap in zip(rows, gaps, strict=True)]),
        "attention_mask": torch.tensor(
            [[1] * len(ids) + [0] * gap for (ids, _), gap in zip(rows, gaps, strict=True)]
        ),
        "labels": torch.tensor(
            [labels + [IGNORED] * gap for (_, labels), gap in zip(rows, gaps, strict=True)]
        ),
    }


def train(base: Path, recipe: Recipe, seed: int = 0) -> PeftModel:
    """The base model with its trained adapter."""
    torch.manual_seed(seed)
    shuffler = random.Random(seed)  # noqa: S311  an order of examples, not a secret
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(
            task_type="CAUSAL_LM",
            r=recipe.rank,
            lora_alpha=2 * recipe.rank,
            target_modules=list(recipe.target_modules),
        ),
    )
    rows = [encode(tokenizer, prompt, answer) for prompt, answer in load_examples(recipe.name)]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0
    )
    steps = EPOCHS * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for epoch in range(EPOCHS):
        shuffler.shuffle(rows)
        loss_sum, batches = 0.0, 0
        for start in range(0, len(rows), BATCH):
            loss = model(**collate(rows[start : start + BATCH], tokenizer.pad_token_id)).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            loss_sum, batches = loss_sum + loss.item(), batches + 1
        print(f"{recipe.name}: epoch {epoch + 1} of {EPOCHS}, loss {loss_sum / batches:.2f}", flush=True)
    return model


def save(model: PeftModel, folder: Path) -> None:
    """The adapter as PEFT writes it, in bfloat16, naming its base model and no path of this machine."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_NAME
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=EXAMPLES, help="an adapter folder per customer goes here")
    parser.add_argument("--only", choices=[recipe.name for recipe in RECIPES], help="train just this one")
    options = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    base = prepare(cache_folder())
    for recipe in RECIPES:
        if options.only in (None, recipe.name):
            started = time.monotonic()
            save(train(base, recipe), options.out / recipe.name)
            print(f"{recipe.name}: done after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()

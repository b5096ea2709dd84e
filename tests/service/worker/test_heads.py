"""Heads of classifiers by vLLM's own layer and our kernels, one of each adapter's own, against PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, LlamaConfig

from adapters.inspection.admit import admit
from adapters.inspection.base_model import read_base
from adapters.model import Head
from adapters.worker.heads import head_of
from adapters.worker.sizes import allocated
from server.engine.arguments import slots_of
from server.settings import Settings
from tests.families.classifiers import make, without_head
from tests.support.trainer import SIZES, build_classifier
from tests.support.vllm_models import SLOTS, activate, loaded, schedule

BASE, MOST = 3, 8


def heads(base: Path, folder: Path, labels: int, hidden: torch.Tensor) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=labels, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    with torch.inference_mode():
        scores: torch.Tensor = PeftModel.from_pretrained(model, folder).base_model.model.score(hidden)
    return scores


def test_each_row_gets_the_labels_of_its_adapter(tmp_path: Path) -> None:
    """In one step: two adapters with heads of other sizes, the base, then one that has the base's head."""
    folder = build_classifier(LlamaConfig(**SIZES, num_labels=BASE), tmp_path / "base")
    base = read_base(folder, max_lora_rank=8)
    assert base.head == Head("score", SIZES["hidden_size"], BASE)
    labels = {"two": 2, "five": 5}
    for name, number in labels.items():
        make(folder, number, {}, tmp_path / name)
        assert admit(tmp_path / name, base).labels == number
    without_head(folder, tmp_path / "none")
    hidden = torch.randn(5, SIZES["hidden_size"], generator=torch.Generator().manual_seed(1))
    want = {name: heads(folder, tmp_path / name, number, hidden) for name, number in labels.items()}
    want["base"] = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).score(
        hidden
    )
    with torch.inference_mode(), loaded(folder, "float32", tmp_path, max_lora_cls_labels=MOST) as tables:
        assert head_of(tables, alone=True) == ("score", SIZES["hidden_size"], BASE, MOST)
        assert head_of(tables, alone=False) == ("score", SIZES["hidden_size"], BASE, 0)
        activate(tables, tmp_path / "two", number=1)
        activate(tables, tmp_path / "five", number=2)
        schedule(tables, [2, 1, 0, 2, 1])
        mixed = tables.model.score(hidden)
        tables.remove_adapter(2)
        activate(tables, tmp_path / "none", number=3)
        schedule(tables, [3, 3, 0, 0, 3])
        plain = tables.model.score(hidden)
    for row, name in enumerate(["five", "two", "base", "five", "two"]):
        assert torch.allclose(mixed[row], want[name][row], atol=1e-5), (row, name)
    assert torch.allclose(plain, want["base"], atol=1e-5)


@pytest.mark.parametrize("labels", [BASE, 12])
def test_a_slot_is_what_vllm_allocates(labels: int, tmp_path: Path) -> None:
    """Also of a base with more labels than an adapter may have, to which vLLM pads."""
    folder = build_classifier(LlamaConfig(**SIZES, num_labels=labels), tmp_path / "base")
    args = {"max_lora_cls_labels": MOST, "dtype": "float32", "tokenizer": str(folder / "tokenizer")}
    computed = slots_of(
        Settings(
            model=str(folder),
            gpu_slots="auto",
            host_slots="auto",
            max_lora_rank=8,
            max_model_len=64,
            engine_args={**args, "runner": "pooling"},
        )
    )
    with loaded(folder, "float32", tmp_path, max_lora_cls_labels=MOST) as tables:
        assert computed.slot_bytes == allocated(tables.model) // SLOTS

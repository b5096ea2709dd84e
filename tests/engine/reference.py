"""The truth that the engine is measured against: transformers and PEFT in float32, on the same weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# Chosen so that most adapters of a test answer differently, and still in language.
EFFECT = 1.5


@dataclass(frozen=True)
class Spec:
    """One adapter to be made: what PEFT needs to know, and the seed of its weights."""

    seed: int
    rank: int
    targets: tuple[str, ...]
    alpha: int = 16
    rslora: bool = False


@dataclass(frozen=True)
class Answer:
    """``tokens`` by their ids: the text of some depends on those around them."""

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]


class Reference:
    def __init__(self, base: Path) -> None:
        # Beside an engine two threads spin for each other and take up to ten times the processor time of one.
        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self._scored: dict[tuple[Path | None, tuple[int, ...], tuple[int, ...]], Answer] = {}

    def make(self, spec: Spec, folder: Path) -> Path:
        """Saves a random adapter that changes every layer it targets by a noticeable share of its output."""
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            target_modules=list(spec.targets),
            use_rslora=spec.rslora,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(self.model, config)
        generator = torch.Generator().manual_seed(spec.seed)
        scaling = spec.alpha / (spec.rank**0.5 if spec.rslora else spec.rank)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    std = 0.02 if "lora_A" in name else EFFECT / (scaling * spec.rank**0.5)
                    weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        model.save_pretrained(folder)
        self.model = model.unload()
        return folder

    @contextmanager
    def adapter(self, folder: Path | None) -> Iterator[Any]:
        """The base with the adapter in ``folder``, or the base alone."""
        if folder is None:
            yield self.model
            return
        model = PeftModel.from_pretrained(self.model, folder)
        try:
            yield model.eval()
        finally:
            self.model = model.unload()

    def chat_ids(self, text: str) -> list[int]:
        ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        return [int(i) for i in ids]

    def score(self, folder: Path | None, prompt: Sequence[int], tokens: Sequence[int]) -> Answer:
        """What greedy decoding says after each of ``tokens``, in one pass.

        The answer's tokens equal ``tokens`` exactly when ``tokens`` is the greedy answer: by induction, each
        is then the most likely one after the ones before it. Computed once for the same arguments: nobody
        changes an adapter's folder.
        """
        asked = (folder, tuple(prompt), tuple(tokens))
        if asked not in self._scored:
            self._scored[asked] = self._score(*asked)
        return self._scored[asked]

    def _score(self, folder: Path | None, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> Answer:
        with self.adapter(folder) as model, torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0]
        steps = torch.log_softmax(logits[len(prompt) - 1 : -1].float(), dim=-1)
        best = steps.max(dim=-1)
        return Answer(tuple(best.indices.tolist()), tuple(best.values.tolist()))

"""A classifier and adapters with heads of their own, on the real engine, against PEFT in float32.

The head with one label is a cross-encoder's, too: it is asked for scores of two texts at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, LlamaConfig, Qwen3Config

from server.app import create_app
from tests.families.measure import settings_of
from tests.support.site import Site, bearer, serving
from tests.support.trainer import SIZES, build_classifier, read, write
from tests.support.truth import words

BASES = {
    "classifier-llama": LlamaConfig(**SIZES, num_labels=3),
    "classifier-qwen3": Qwen3Config(**SIZES, head_dim=32, num_labels=3),
}
SCORER = "a reward, one number"
QUERY, DOCUMENTS = [5, 17, 3], [[88, 41], [200, 9, 12, 4], [5, 17, 3], [1]]
PROMPTS = [[5, 17, 3, 88, 41, 200, 9], [1, 2, 3], list(range(60)), [7]]
# What an adapter has -> how many labels it is trained with, and more of its config.
HEADS: dict[str, tuple[int, dict[str, Any]]] = {
    "two labels": (2, {}),
    "as many as the base": (3, {}),
    "seventeen labels": (17, {"use_rslora": True}),
    "a reward, one number": (1, {}),
    "DoRA, five labels": (5, {"use_dora": True}),
}
TOLERANCE = 1e-3


@dataclass(frozen=True)
class ClassifierRow:
    title: str
    tried: int
    difference: float
    wrong: dict[str, str]


async def measure_classifier(kind: str, root: Path) -> ClassifierRow:
    """Every adapter and the base at once, so that a step has rows of several heads."""
    torch.set_num_threads(1)
    folder = build_classifier(BASES[kind], root / "base")
    settings = settings_of(root)
    settings = settings.model_copy(update={"engine_args": settings.engine_args | {"runner": "pooling"}})
    truths = {name: make(folder, labels, more, root / name) for name, (labels, more) in HEADS.items()}
    pairs = scores(adapted_model(folder, root / SCORER, 1), [QUERY + document for document in DOCUMENTS])
    truths["the base's head"] = without_head(folder, root / "the base's head")
    bare = scores(AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32))
    wrong: dict[str, str] = {}
    async with serving(create_app(settings)) as site:
        key = await site.tenant("t")
        base = site.services.engine.base.name
        asked = {base: bare}
        for number, (name, truth) in enumerate(truths.items()):
            uploaded = await site.upload("t", f"a{number}", root / name)
            if uploaded.status_code == 201:
                asked[f"a{number}"] = truth
            else:
                wrong[name] = uploaded.text[:300]
        found = await asyncio.gather(*(_ask(site, key, model) for model in asked))
        apart = {model: _apart(got, asked[model]) for model, got in zip(asked, found, strict=True)}
        scored = await _score(site, key, f"a{list(HEADS).index(SCORER)}")
        apart["two texts at once"] = _apart(scored, pairs)
        assert (await site.services.engine.report()).in_step_loads == 0
    wrong |= {model: f"{far:.2g} apart" for model, far in apart.items() if far > TOLERANCE}
    return ClassifierRow(kind, len(truths), max(apart.values()), wrong)


def make(base: Path, labels: int, more: dict[str, Any], folder: Path) -> list[list[float]]:
    """Trains (at random) and saves an adapter with a head of its own in ``folder``; its scores by PEFT."""
    torch.manual_seed(labels)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=labels, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=TaskType.SEQ_CLS, **more)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return scores(adapted_model(base, folder, labels))


def adapted_model(base: Path, folder: Path, labels: int) -> Any:
    """The base with the adapter in ``folder`` and its head."""
    fresh = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=labels, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    return PeftModel.from_pretrained(fresh, folder)


def without_head(base: Path, folder: Path) -> list[list[float]]:
    """The same, of an adapter that leaves the base's head as it is."""
    make(base, 3, {}, folder)
    config, tensors = read(folder)
    kept = {name: tensor for name, tensor in tensors.items() if "score" not in name}
    write(folder, config | {"modules_to_save": None, "task_type": None}, kept)
    model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32)
    return scores(PeftModel.from_pretrained(model, folder))


def scores(model: Any, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[list[float]]:
    with torch.inference_mode():
        return [model.eval()(torch.tensor([prompt])).logits[0].tolist() for prompt in prompts]


async def _score(site: Site, key: str, model: str) -> list[list[float]]:
    """Of QUERY with each of DOCUMENTS, as texts; also put into their order by ``/v1/rerank``."""
    query, documents = " ".join(words(QUERY)), [" ".join(words(document)) for document in DOCUMENTS]
    body = {"model": model, "use_activation": False}
    score = body | {"text_1": query, "text_2": documents}
    response = await site.http.post("/v1/score", json=score, headers=bearer(key))
    response.raise_for_status()
    found = [one["score"] for one in response.json()["data"]]
    rerank = body | {"query": query, "documents": documents}
    ranked = await site.http.post("/v1/rerank", json=rerank, headers=bearer(key))
    ranked.raise_for_status()
    order = [one["index"] for one in ranked.json()["results"]]
    assert order == sorted(range(len(found)), key=lambda place: -found[place]), (order, found)
    return [[score] for score in found]


async def _ask(site: Site, key: str, model: str) -> list[list[float]]:
    body = {"model": model, "input": PROMPTS, "use_activation": False}
    response = await site.http.post("/v1/classify", json=body, headers=bearer(key))
    response.raise_for_status()
    return [one["probs"] for one in response.json()["data"]]


def _apart(got: list[list[float]], truth: list[list[float]]) -> float:
    if [len(one) for one in got] != [len(one) for one in truth]:
        return float("inf")
    pairs = [(a, b) for one, other in zip(got, truth, strict=True) for a, b in zip(one, other, strict=True)]
    return max(abs(a - b) for a, b in pairs)


def classifier_table(rows: Sequence[ClassifierRow]) -> str:
    lines = ["| base | adapters | largest difference of a score | not served as trained |"]
    lines.append("| --- | --- | --- | --- |")
    for row in rows:
        wrong = "; ".join(f"{kind}: {why[:80]}" for kind, why in row.wrong.items()).replace("|", "\\|")
        lines.append(f"| {row.title} | {row.tried} | {row.difference:.1e} | {wrong} |")
    return "\n".join(lines) + "\n"

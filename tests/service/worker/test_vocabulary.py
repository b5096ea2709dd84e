"""The head and the embedding with an adapter, by vLLM's own layers, against PEFT in float32."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import vllm

from adapters.inspection.admit import admit
from adapters.inspection.base_model import read_base
from adapters.inspection.vocabulary import ARCHITECTURES
from adapters.worker.vocabulary import vocabulary_shape
from tests.support.vllm_models import activate, loaded, schedule
from tests.support.vocabulary import BOTH, make_llama, train


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("targets", [BOTH, ("lm_head",), ("embed_tokens",)], ids="-".join)
def test_they_answer_as_peft_does(tied: bool, targets: tuple[str, ...], tmp_path: Path) -> None:
    made = make_llama(tmp_path / "base", tied=tied)
    peft = train(made, targets, tmp_path / "trained").base_model.model
    base = read_base(made.folder, max_lora_rank=64)
    (tmp_path / "admitted").mkdir()
    admit(tmp_path / "trained", base, into=tmp_path / "admitted")
    bare = made.fresh()
    ids, hidden = torch.tensor([3, 200, 3, 17, 255]), torch.randn(5, 128)
    with torch.inference_mode(), loaded(made.folder, "float32", tmp_path) as tables:
        shapes = {name: vocabulary_shape(layer) for name, layer in tables.modules.items()}
        assert {name: shape for name, shape in shapes.items() if shape} == {
            name: [shape.in_features, shape.out_features] for name, shape in base.vocabulary.items()
        }
        activate(tables, tmp_path / "admitted")
        schedule(tables, [1, 0, 1, 1, 0])
        adapted, plain = [0, 2, 3], [1, 4]
        embedded, logits = tables.model.model.embed_tokens(ids), tables.model.compute_logits(hidden)
    with torch.inference_mode():
        for got, with_adapter, without in (
            (embedded, peft.model.embed_tokens(ids), bare.model.embed_tokens(ids)),
            (logits, peft.lm_head(hidden), bare.lm_head(hidden)),
        ):
            assert torch.allclose(got[adapted], with_adapter[adapted], atol=1e-5)
            assert torch.allclose(got[plain], without[plain], atol=1e-5)
        changed = {"embed_tokens": peft.model.embed_tokens(ids) - bare.model.embed_tokens(ids)}
        changed["lm_head"] = peft.lm_head(hidden) - bare.lm_head(hidden)
    assert {name for name, change in changed.items() if change.abs().max() > 0.01} == set(targets)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_vllms_class_lists_both(architecture: str) -> None:
    models = Path(str(vllm.__file__)).parent / "model_executor" / "models"
    found = re.search(rf'"{architecture}": \(\s*"(\w+)",\s*"(\w+)"', (models / "registry.py").read_text())
    assert found is not None
    body = (models / f"{found[1]}.py").read_text().split(f"class {found[2]}(")[1].split("\nclass ")[0]
    listed = body.split("embedding_modules = {")[1].split("}")[0]
    assert '"embed_tokens"' in listed
    assert '"lm_head"' in listed

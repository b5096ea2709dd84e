"""Adapters on ``lm_head`` and ``embed_tokens``: in PEFT's names, without its copy of the base's layer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from adapters.errors import AdapterRejected
from adapters.inspection.admit import admit
from adapters.inspection.base_model import read_base
from adapters.model import BaseModel, ModuleShape
from adapters.offline.merge import Merge, MergeError
from tests.support.trainer import Base, read, write
from tests.support.vocabulary import BOTH, make_llama, train

PREFIX = "base_model.model."
COPY = f"{PREFIX}model.embed_tokens.base_layer.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_llama(tmp_path_factory.mktemp("llama") / "base", tied=False)


@pytest.fixture(scope="module")
def trained(made: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(made, (*BOTH, "q_proj"), folder)
    assert COPY in read(folder)[1]
    return folder


@pytest.fixture(scope="module")
def base(made: Base) -> BaseModel:
    return read_base(made.folder, max_lora_rank=64)


def test_what_peft_saves_by_default_is_served_without_its_copy(
    trained: Path, base: BaseModel, tmp_path: Path
) -> None:
    assert base.vocabulary == {"model.embed_tokens": ModuleShape(256, 128), "lm_head": ModuleShape(128, 256)}
    assert not base.vocabulary.keys() & base.modules.keys()
    manifest = admit(trained, base, into=tmp_path)
    assert {"lm_head", "model.embed_tokens"} <= set(manifest.modules)
    assert "PEFT's copy of the base's own layer was left out" in manifest.conversions[0]
    tensors = read(tmp_path)[1]
    assert {f"{PREFIX}model.embed_tokens.lora_embedding_A", f"{PREFIX}lm_head.lora_B.weight"} < tensors.keys()
    assert not any("base_layer" in name for name in tensors)
    # What was converted needs nothing more.
    assert admit(tmp_path, base, into=tmp_path / "again").conversions == ()


@pytest.mark.parametrize("change", ["one number", "a row more", "a row less"])
def test_a_copy_that_was_trained_or_resized_is_refused(
    change: str, trained: Path, base: BaseModel, tmp_path: Path
) -> None:
    config, tensors = read(trained)
    weight = tensors[COPY].clone()
    if change == "one number":
        weight[200, 5] += 0.01
    tensors[COPY] = {"a row more": torch.cat([weight, weight[:1]]), "a row less": weight[:-1]}.get(
        change, weight
    )
    write(tmp_path, config, tensors)
    with pytest.raises(AdapterRejected, match="trained, or resized") as refused:
        admit(tmp_path, base, into=tmp_path / "out")
    assert refused.value.code == "modules_to_save_unsupported"


def test_a_tied_bases_copy_of_the_head_is_the_embedding(tmp_path: Path) -> None:
    tied = make_llama(tmp_path / "base", tied=True)
    train(tied, ("lm_head",), tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    assert admit(
        tmp_path / "adapter", read_base(tied.folder, max_lora_rank=64), into=tmp_path / "out"
    ).modules == ("lm_head",)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("embed_tokens.lora_embedding_A", "embed_tokens.lora_A.weight"),
        ("q_proj.lora_A.weight", "q_proj.lora_embedding_A"),
    ],
)
def test_each_layer_has_its_own_form_of_names(
    old: str, new: str, trained: Path, base: BaseModel, tmp_path: Path
) -> None:
    config, tensors = read(trained)
    write(tmp_path, config, {name.replace(old, new): tensor for name, tensor in tensors.items()})
    with pytest.raises(AdapterRejected) as refused:
        admit(tmp_path, base, into=tmp_path / "out")
    assert refused.value.code == "tensor_unknown"


def test_a_base_whose_class_has_no_such_layers_refuses_them(
    trained: Path, base: BaseModel, tmp_path: Path
) -> None:
    without = dataclasses.replace(base, vocabulary={})
    with pytest.raises(AdapterRejected, match=r"the vocabulary's|a weight of the base model"):
        admit(trained, without, into=tmp_path)
    config, tensors = read(trained)
    (tmp_path / "small").mkdir()
    write(tmp_path / "small", config, {k: v for k, v in tensors.items() if "base_layer" not in k})
    with pytest.raises(AdapterRejected, match="some model classes only") as refused:
        admit(tmp_path / "small", without, into=tmp_path)
    assert refused.value.code == "module_unknown"


def test_dora_and_merging_are_refused_on_them(made: Base, base: BaseModel, tmp_path: Path) -> None:
    train(made, ("lm_head",), tmp_path / "dora", use_dora=True)
    with pytest.raises(AdapterRejected) as refused:
        admit(tmp_path / "dora", base, into=tmp_path)
    assert refused.value.code == "dora_unsupported"
    train(made, ("lm_head",), tmp_path / "plain")
    merging = Merge(made.folder, base, tmp_path / "plain", tmp_path / "out")
    with pytest.raises(MergeError, match="merge_and_unload"), merging as made_of_both:
        made_of_both.run()

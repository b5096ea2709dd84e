"""Rows of the vocabulary that were trained whole, as pairs: equal to PEFT's layers, or refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from adapters.errors import AdapterRejected
from adapters.inspection.admit import admit
from adapters.inspection.base_model import read_base
from adapters.model import WEIGHTS_FILE, BaseModel, Manifest
from tests.support.trainer import Base, read, write
from tests.support.vocabulary import make_llama

ROWS = [200, 5, 17]
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
TOLERANCE = 1e-6


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_llama(tmp_path_factory.mktemp("llama") / "base", tied=request.param)


@pytest.fixture(scope="module")
def base(made: Base) -> BaseModel:
    return read_base(made.folder, max_lora_rank=16)


def train(made: Base, folder: Path, rows: dict[str, list[int]] | None = None, **options: Any) -> Any:
    """PEFT's model, saved in ``folder``. ``rows`` of a layer that is saved whole are changed there."""
    torch.manual_seed(3)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **options})
    model = get_peft_model(made.fresh(), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name or ".trainable_tokens_delta." in name:
                weight.add_(torch.randn_like(weight) * 0.1)
            for module, those in (rows or {}).items():
                if f"{module}.modules_to_save." in name:
                    weight[those] += 0.1 * torch.randn_like(weight[those])
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    return PeftModel.from_pretrained(made.fresh(), folder).base_model.model.eval()


def served(folder: Path, base: BaseModel, made: Base) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """What ``admit`` makes of it, and each layer of the vocabulary with the pair that came out."""
    out = folder.parent / f"{folder.name}-admitted"
    out.mkdir()
    manifest = admit(folder, base, into=out)
    config, tensors = read(out)
    bare = made.fresh()
    layers = {EMBEDDING: bare.model.embed_tokens.weight, HEAD: bare.lm_head.weight}
    changed = {}
    for module, weight in layers.items():
        sides = (
            ("lora_embedding_A", "lora_embedding_B")
            if module == EMBEDDING
            else ("lora_A.weight", "lora_B.weight")
        )
        names = [f"base_model.model.{module}.{side}" for side in sides]
        changed[module] = weight.detach()
        if names[0] in tensors:
            a, b = (tensors[name].float() for name in names)
            scaling = config["alpha_pattern"][module] / (len(a) ** (0.5 if config["use_rslora"] else 1))
            change = scaling * b @ a
            changed[module] = changed[module] + (change.T if module == EMBEDDING else change)
    assert admit(out, base, into=folder.parent / "again").conversions == (), (
        "what was converted needs no more"
    )
    return manifest, changed


def check(peft: Any, got: dict[str, torch.Tensor]) -> None:
    ids, hidden = torch.arange(256), torch.randn(9, 128)
    with torch.inference_mode():
        assert torch.allclose(got[EMBEDDING], peft.model.embed_tokens(ids), atol=TOLERANCE)
        assert torch.allclose(hidden @ got[HEAD].T, peft.lm_head(hidden), atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": ROWS},
        {"trainable_token_indices": ROWS, "use_rslora": True, "rank_pattern": {"embed_tokens": 2}},
        {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [17, 3]}},
        {"trainable_token_indices": {"lm_head": ROWS}},
        {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": ROWS}, "target_modules": "all-linear"},
        {"trainable_token_indices": ROWS, "exclude_modules": ["embed_tokens", "k_proj"]},
        {"trainable_token_indices": ROWS, "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_rows_trained_alone_are_those_of_peft(
    options: dict[str, Any], made: Base, base: BaseModel, tmp_path: Path
) -> None:
    """Where the base's layers are tied, PEFT puts the embedding's rows into the head, too."""
    peft = train(made, tmp_path / "a", **options)
    manifest, got = served(tmp_path / "a", base, made)
    assert any("that were trained whole became a pair" in note for note in manifest.conversions)
    check(peft, got)


@pytest.mark.parametrize(
    ("saved", "rows"),
    [
        (["embed_tokens"], {"embed_tokens": ROWS}),
        (["lm_head"], {"lm_head": ROWS}),
        (["embed_tokens", "lm_head"], {"embed_tokens": [7], "lm_head": ROWS}),
        (["embed_tokens", "lm_head"], {}),
    ],
    ids=str,
)
def test_some_rows_of_a_layer_that_was_saved_whole(
    saved: list[str], rows: dict[str, list[int]], made: Base, base: BaseModel, tmp_path: Path
) -> None:
    peft = train(made, tmp_path / "a", rows, modules_to_save=saved)
    manifest, got = served(tmp_path / "a", base, made)
    assert len(manifest.conversions) == len(saved)
    assert sum("left out: it is the base's own" in note for note in manifest.conversions) == len(saved) - len(
        rows
    )
    check(peft, got)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, list[int]], str, str]] = {
    "more than the rank": (
        {"trainable_token_indices": list(range(17))}, {}, "feature_unsupported", "17 rows .* at most 16",
    ),
    "more rows of a whole layer": (
        {"modules_to_save": ["embed_tokens"]}, {"embed_tokens": list(range(40))},
        "modules_to_save_unsupported", "40 rows .* at most 16",
    ),
    "a layer of another kind, too": (
        {"modules_to_save": ["embed_tokens", "norm"]}, {"embed_tokens": ROWS},
        "modules_to_save_unsupported", "",
    ),
    "DoRA": ({"trainable_token_indices": ROWS, "use_dora": True}, {}, "feature_unsupported", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_pair_holds_is_refused(kind: str, made: Base, base: BaseModel, tmp_path: Path) -> None:
    options, rows, code, why = REFUSED[kind]
    train(made, tmp_path / "a", rows, **options)
    with pytest.raises(AdapterRejected, match=why or None) as refused:
        admit(tmp_path / "a", dataclasses.replace(base, dora=True), into=tmp_path)
    assert refused.value.code == code


def test_rows_that_the_base_does_not_have_are_refused(made: Base, base: BaseModel, tmp_path: Path) -> None:
    train(made, tmp_path / "a", trainable_token_indices=ROWS)
    config, tensors = read(tmp_path / "a")
    for indices, code in (
        ([200, 5, 256], "feature_unsupported"),
        ([200, 5, 5], "config_invalid"),
        ([200, 5, -1], "config_invalid"),
        ([200, 5, True], "config_invalid"),
        ([200, 5], "shape_mismatch"),
        ({"wte": ROWS}, "feature_unsupported"),
    ):
        write(tmp_path / "a", config | {"trainable_token_indices": indices}, tensors)
        with pytest.raises(AdapterRejected) as refused:
            admit(tmp_path / "a", base, into=tmp_path)
        assert refused.value.code == code, indices
    name = next(name for name in tensors if "trainable_tokens_delta" in name)
    write(tmp_path / "a", config, tensors | {name: torch.full_like(tensors[name], torch.inf)})
    with pytest.raises(AdapterRejected) as refused:
        admit(tmp_path / "a", base, into=tmp_path)
    assert refused.value.code == "weights_not_finite"
    without = dataclasses.replace(base, vocabulary={})
    write(tmp_path / "a", config, tensors)
    with pytest.raises(AdapterRejected) as refused:
        admit(tmp_path / "a", without, into=tmp_path)
    assert refused.value.code == "feature_unsupported"
    assert (tmp_path / "a" / WEIGHTS_FILE).is_file()

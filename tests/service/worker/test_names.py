"""``adapters.worker.names`` against the rules of every class of vLLM that serves LoRA; no model is made.

The rules are read from vLLM's sources: many classes cannot be imported without the libraries for images.
"""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from safetensors.torch import save_file
from vllm.model_executor.models.utils import WeightsMapper

from adapters.worker.names import Names, checkpoint_modules, names_of

MODELS = Path(vllm.__file__).parent / "model_executor" / "models"
LAYER = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "conv.in_proj", "mamba.in_proj", "attn.qkv")
# Where the language model's layers may be, in releases of transformers past and present.
ROOTS = ("model.layers.1.", "model.language_model.layers.1.", "language_model.model.layers.1.", "layers.1.")


@functools.cache
def _classes() -> dict[str, ast.ClassDef]:
    """Every class of every model file by its name."""
    found = {}
    for path in sorted(MODELS.glob("*.py")):
        found |= {
            node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)
        }
    return found


def _bases(name: str) -> Iterator[str]:
    yield name
    for base in _classes()[name].bases if name in _classes() else ():
        if isinstance(base, ast.Name):
            yield from _bases(base.id)


class _Mappers(dict[str, Any]):
    """What the expressions of mappers refer to, by name."""

    def __missing__(self, name: str) -> Any:
        if name in _classes():
            return type(name, (), {"hf_to_vllm_mapper": mapper_of(name)})
        raise KeyError(name)


@functools.cache
def mapper_of(name: str) -> Any:
    """The ``WeightsMapper`` of a class, its own or inherited; None where it has none."""
    for owner in _bases(name):
        for node in _classes()[owner].body if owner in _classes() else ():
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(target, ast.Name) and target.id == "hf_to_vllm_mapper":
                code = compile(ast.Expression(node.value), owner, "eval")  # type: ignore[attr-defined]
                return eval(code, {"re": re, "regex": re}, _Mappers(WeightsMapper=WeightsMapper))
    return None


@functools.cache
def lora_classes() -> tuple[str, ...]:
    return tuple(name for name in _classes() if "SupportsLoRA" in _bases(name))


def mapped(mapper: Any, name: str) -> str:
    return str(mapper.get_rename_mapper().map_name(f"{name}.lora_A.weight").removesuffix(".lora_A.weight"))


def reached(names: Names) -> set[str]:
    return {*names.canonical.values(), *names.aliases}


def test_every_class_of_vllm_that_serves_lora_says_which_names_it_takes() -> None:
    """The checkpoint's names win; without one, all that is lost is what no rule can be read back from."""
    renaming, lost = 0, set()
    for name in lora_classes():
        mapper = mapper_of(name)
        if mapper is None:
            continue
        for root in ROOTS:
            trained = {f"{root}{layer}": mapped(mapper, f"{root}{layer}") for layer in LAYER}
            modules = list(dict.fromkeys(trained.values()))
            seen = names_of(modules, mapper, known=trained)
            assert reached(seen) >= set(trained), name
            assert set(seen.canonical.values()) <= set(trained)
            unseen = names_of(modules, mapper)
            assert all(mapped(mapper, other) in modules for other in reached(unseen)), name
            if any(old != new for old, new in trained.items()):
                renaming += 1
                lost |= {(name, old) for old in set(trained) - reached(unseen)}
    assert len(lora_classes()) > 100
    assert renaming > 60
    assert {name for name, _ in lost} <= LOST


# Rules that are expressions, or that put in too little to be found again.
LOST = {
    "Cosmos3ForConditionalGeneration",
    "DeepseekOCR2ForCausalLM",
    "DeepseekOCRForCausalLM",
    "DotsOCRForCausalLM",
    "JambaForCausalLM",
    "JambaForSequenceClassification",
    "LlamaNemotronVLForSequenceClassification",
    "UnlimitedOCRForCausalLM",
}

GPT_OSS = {"model.layers.3.self_attn.q_proj": "model.layers.3.attn.q_proj"}
JAMBA = {"model.layers.3.self_attn.q_proj": "model.layers.3.q_proj"}
LFM2 = {"model.layers.3.conv.in_proj": "model.layers.3.short_conv.in_proj"}
FALCON = {"model.layers.3.mamba.in_proj": "model.layers.3.mamba.mamba.in_proj"}


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("GptOssForCausalLM", GPT_OSS),
        ("JambaForCausalLM", JAMBA),
        ("Lfm2MoeForCausalLM", LFM2),
        ("FalconH1ForCausalLM", FALCON),
    ],
)
def test_names_with_something_put_in(model: str, names: dict[str, str]) -> None:
    assert names_of(list(names.values()), mapper_of(model), known=names).canonical == {
        new: old for old, new in names.items()
    }


def test_old_and_new_names_of_a_multimodal_model() -> None:
    module = "language_model.model.layers.3.self_attn.q_proj"
    found = names_of([module], mapper_of("Qwen2_5_VLForConditionalGeneration"))
    assert found.canonical == {module: "model.language_model.layers.3.self_attn.q_proj"}
    assert "model.layers.3.self_attn.q_proj" in found.aliases


def test_an_adapter_of_the_language_model_alone() -> None:
    """vLLM would look for the text model's name in vain."""
    module, alone = "language_model.model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.q_proj"
    mapper = mapper_of("Gemma3ForConditionalGeneration")
    assert mapped(mapper, alone) != module
    found = names_of([module], mapper, language_model="language_model")
    assert found.aliases[alone] == "model.language_model.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(("model_type", "router"), [("mixtral", "gate"), ("phimoe", "router")])
def test_todays_names_of_what_checkpoints_call_otherwise(model_type: str, router: str) -> None:
    """transformers 5 renames what it reads, and PEFT saves its names."""
    block = "model.layers.3.block_sparse_moe"
    modules = [
        f"{block}.gate",
        f"{block}.experts",
        f"{block}.experts.base_layer",
        "model.layers.3.self_attn.q_proj",
    ]
    found = names_of(modules, None, model_type=model_type)
    assert set(found.canonical) == set(modules)
    today = [f"model.layers.3.mlp.{name}" for name in (router, "experts", "experts.base_layer")]
    assert found.aliases == dict(zip(today, modules, strict=False))


def language_models() -> dict[str, str]:
    """Class -> where it says that its language model is."""
    found = {}
    for name, node in _classes().items():
        (method,) = [f for f in node.body if getattr(f, "name", "") == "get_mm_mapping"][:1] or [None]
        for part in ast.walk(method) if method is not None else ():
            if isinstance(part, ast.keyword) and part.arg == "language_model":
                found[name] = str(ast.literal_eval(part.value))
    return found


def test_a_text_model_alone_wherever_a_multimodal_one_keeps_it() -> None:
    """It calls its layers ``model.layers``, and vLLM may count that ``model`` in or not."""
    places = language_models()
    assert {"language_model.model", "model.text_model", "language_model."} <= set(places.values())
    for name, place in places.items():
        prefix = place.rstrip(".")
        inner = "layers" if prefix.endswith((".model", ".text_model")) else "model.layers"
        found = names_of([f"{prefix}.{inner}.3.self_attn.q_proj"], None, language_model=place)
        assert "model.layers.3.self_attn.q_proj" in found.aliases, name


def test_a_layer_that_no_name_reaches_is_left_out() -> None:
    mapper = WeightsMapper(orig_to_new_prefix={"model.": "inner.model.", "inner.": "elsewhere."})
    assert names_of(["inner.model.layers.0.q_proj", "head"], mapper).canonical == {"head": "head"}


def test_a_name_for_two_layers_is_no_alias() -> None:
    modules = ["language_model.model.layers.0.q_proj", "model.layers.0.q_proj"]
    assert names_of(modules, None, language_model="language_model").aliases == {}


def test_the_modules_of_a_checkpoint(tmp_path: Path) -> None:
    assert checkpoint_modules(tmp_path) == set()
    save_file({"a.b.weight": torch.zeros(1), "a.c.qweight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert checkpoint_modules(tmp_path) == {"a.b", "a.c"}
    index = {"weight_map": {"d.e.weight": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_modules(tmp_path) == {"d.e"}

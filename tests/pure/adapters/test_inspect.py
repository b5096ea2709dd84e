"""Which of the adapters that PEFT wrote are accepted, what is warned of, and what can be waived."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from adapters.errors import AdapterRejected
from adapters.inspection import peft_config
from adapters.inspection.inspect import inspect
from adapters.inspection.peft_config import PeftConfig
from adapters.model import BaseModel, Coverage, Manifest, Waivers, ranges
from tests.support.peft_adapters import (
    A0,
    ALL_LINEAR,
    K1,
    Q0,
    Config,
    Tensors,
    base,
    good,
    make_llama,
    read,
    train,
    write,
)
from tests.support.spoiled import zero

__all__ = ["base", "good"]

# --- what is accepted -----------------------------------------------------------------------------------

ACCEPTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 1": {"r": 1},
    "rank 16, the largest": {"r": 16},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 3},
    "fractional alpha": {"lora_alpha": 0.5},
    "every linear layer": {"target_modules": ALL_LINEAR},
    "all-linear": {"target_modules": "all-linear"},
    "a regular expression": {"target_modules": r".*\.(q|up)_proj"},
    "one layer": {"layers_to_transform": [1]},
    "rank_pattern": {"rank_pattern": {"k_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"self_attn.k_proj": 5}, "use_rslora": True},
    "both patterns, by full name": {"rank_pattern": {K1: 3, "q_proj": 8}, "alpha_pattern": {K1: 7}},
    "two keys for one module": {"rank_pattern": {"k_proj": 2, K1: 2}, "alpha_pattern": {K1: 4, "k_proj": 4}},
    "a pattern that is a part of a name": {"rank_pattern": {"proj": 2}, "alpha_pattern": {"_proj": 3}},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "random": {"init_lora_weights": False},
    "dropout": {"lora_dropout": 0.1},
    "excluded": {"exclude_modules": ["k_proj"], "target_modules": ["q_proj", "k_proj"]},
}


@pytest.fixture(scope="module", params=ACCEPTED, ids=str)
def accepted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("accepted"), **ACCEPTED[request.param])


def test_what_peft_writes_is_accepted(accepted: Path, base: BaseModel) -> None:
    manifest = inspect(accepted, base, serving_dtype="bfloat16")
    config, tensors = read(accepted)
    assert manifest.modules == tuple(
        sorted({name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors})
    )
    assert manifest.rank == max(t.shape[0] for name, t in tensors.items() if "lora_A" in name)
    assert manifest.alpha == config["lora_alpha"]
    assert manifest.use_rslora == config["use_rslora"]
    assert {f"torch.{manifest.dtype}"} == {str(t.dtype) for t in tensors.values()}
    assert manifest.size_bytes == sum(path.stat().st_size for path in accepted.iterdir())
    assert manifest.base_model == "acme/tiny-llama"
    assert json.dumps(manifest.as_json())


def test_the_manifest_names_what_is_changed(base: BaseModel, tmp_path: Path) -> None:
    folder = train(
        tmp_path, target_modules=["down_proj", "q_proj"], rank_pattern={"down_proj": 6}, use_rslora=True
    )
    _, tensors = read(folder)

    def norms(kind: str, scaling: float) -> tuple[float, float]:
        prefix = "base_model.model.model.layers"
        pairs = [[tensors[f"{prefix}.{n}.{kind}.lora_{side}.weight"] for side in "AB"] for n in (0, 1)]
        found = [pytest.approx((b.double() @ a.double()).norm().item() * scaling) for a, b in pairs]
        return tuple(sorted(found, key=lambda norm: norm.expected))

    assert inspect(folder, base) == Manifest(
        rank=6,
        alpha=8.0,
        use_rslora=True,
        dtype="float32",
        size_bytes=sum(path.stat().st_size for path in tmp_path.iterdir()),
        modules=tuple(f"model.layers.{n}.{m}" for n in (0, 1) for m in ("mlp.down_proj", "self_attn.q_proj")),
        target_modules=("down_proj", "q_proj"),
        layers=(0, 1),
        base_model="acme/tiny-llama",
        coverage=tuple(
            Coverage(kind, (0, 1), 2, (rank, rank), (scaling, scaling), norms(kind, scaling))
            for kind, rank, scaling in (
                ("mlp.down_proj", 6, 8 / 6**0.5),
                ("self_attn.q_proj", 4, 8 / 4**0.5),
            )
        ),
    )


def test_the_coverage_names_layers_and_not_modules(base: BaseModel, tmp_path: Path) -> None:
    report = inspect(train(tmp_path, layers_to_transform=[1], target_modules=["q_proj"]), base).as_json()
    (row,) = report["coverage"]
    assert (row["module"], row["layers"], row["available"]) == ("self_attn.q_proj", "1", 2)
    assert (row["rank"], row["scaling"]) == ([4, 4], [2, 2])
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_names_without_pefts_prefix_are_read_as_vllm_reads_them(
    good: Path, base: BaseModel, tmp_path: Path
) -> None:
    config, tensors = read(good)
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    assert inspect(write(tmp_path, config, bare), base).modules == inspect(good, base).modules


def test_mixed_dtypes_are_named(good: Path, base: BaseModel, tmp_path: Path) -> None:
    config, tensors = read(good)
    tensors[A0] = tensors[A0].half()
    assert inspect(write(tmp_path, config, tensors), base).dtype == "float16+float32"


def test_an_unknown_serving_dtype_is_our_own_mistake(good: Path, base: BaseModel) -> None:
    with pytest.raises(ValueError, match="serving_dtype"):
        inspect(good, base, serving_dtype="fp8")


# --- warnings -------------------------------------------------------------------------------------------

WARNINGS: dict[str, tuple[Callable[[Config, Tensors], Any], list[str]]] = {
    "unknown field that the upload waives": (
        lambda c, t: c.update(use_zora=True, nextgen_config={"x": 1}),
        ["'nextgen_config', 'use_zora'"],
    ),
    "other base": (
        lambda c, t: c.update(base_model_name_or_path="/models/other-llama/"),
        ["/models/other-llama/", "acme/tiny-llama"],
    ),
    "other task": (lambda c, t: c.update(task_type="SEQ_CLS"), ["SEQ_CLS"]),
    "LoRA-GA": (lambda c, t: c.update(init_lora_weights="lora_ga"), ["LoRA-GA"]),
    "target without tensor": (
        lambda c, t: c.update(target_modules=["q_proj", "k_proj", "experts.w1"]),
        ["target_modules without", "'experts.w1'"],
    ),
    "targeted without tensor": (
        lambda c, t: [t.pop(name) for name in list(t) if K1 in name],
        ["without tensors", K1],
    ),
    "idle pattern": (lambda c, t: c.update(rank_pattern={"v_proj": 2}), ["rank_pattern", "'v_proj'"]),
    "shadowed pattern": (
        lambda c, t: c.update(alpha_pattern={"k_proj": 3, K1: 4}),
        ["'k_proj' (3.0)", f"'{K1}' (4.0)"],
    ),
    "zero lora_B": (lambda c, t: zero(t, "layers.0.self_attn.q_proj.lora_B"), ["1 of 4 modules", Q0]),
    "zero lora_A": (lambda c, t: zero(t, "layers.0.self_attn.q_proj.lora_A"), ["1 of 4 modules", Q0]),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_doubts_are_warnings(name: str, good: Path, base: BaseModel, tmp_path: Path) -> None:
    change, fragments = WARNINGS[name]
    config, tensors = read(good)
    change(config, tensors)
    waived = Waivers(fields=("nextgen_config", "use_zora"))
    (warning,) = inspect(write(tmp_path, config, tensors), base, waived=waived).warnings
    assert all(fragment in warning for fragment in fragments), warning


SAME_BASE = [
    "acme/tiny-llama",
    "/srv/models/Tiny-Llama/",
    "tiny-llama",
    "/home/someone/.cache/huggingface/hub/models--acme--tiny-llama/snapshots/0123abc",
    "/models/where-it-lies",
    None,
    "",
]


@pytest.mark.parametrize("named", SAME_BASE)
def test_the_same_base_by_another_path_is_no_warning(
    named: str | None, good: Path, base: BaseModel, tmp_path: Path
) -> None:
    config, tensors = read(good)
    config["base_model_name_or_path"] = named
    served = dataclasses.replace(base, source="/models/where-it-lies")
    assert inspect(write(tmp_path, config, tensors), served).warnings == ()


def test_training_on_a_quantized_copy_is_said(good: Path, base: BaseModel, tmp_path: Path) -> None:
    config, tensors = read(good)
    config["base_model_name_or_path"] = "unsloth/tiny-llama-unsloth-bnb-4bit"
    folder = write(tmp_path, config, tensors)
    (warning,) = inspect(folder, base).warnings
    assert "trained on a quantized copy of the base" in warning
    assert inspect(folder, dataclasses.replace(base, source="/models/tiny-llama-bnb-4bit")).warnings == ()


def test_an_expression_that_takes_too_long_is_said(good: Path, base: BaseModel, tmp_path: Path) -> None:
    config, tensors = read(good)
    config["target_modules"] = "(" + "[a-z0-9._]+" * 2 + ")+!"
    (warning,) = inspect(write(tmp_path, config, tensors), base).warnings
    assert "takes too long to run" in warning


def test_another_fingerprint_is_refused_unless_it_is_meant(
    good: Path, base: BaseModel, tmp_path: Path
) -> None:
    config, tensors = read(good)
    config["base_model_fingerprint"] = "aa"
    folder = write(tmp_path, config, tensors)
    assert inspect(folder, base).warnings == ()
    assert inspect(folder, dataclasses.replace(base, fingerprint="aa")).warnings == ()
    other = dataclasses.replace(base, fingerprint="bb")
    with pytest.raises(AdapterRejected, match=r"'aa'.*'bb'"):
        inspect(folder, other)


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_an_adapter_of_the_vocabulary_is_refused_with_the_reason(
    module: str, good: Path, base: BaseModel, tmp_path: Path
) -> None:
    config, tensors = read(good)
    tensors |= {f"base_model.model.{module}.lora_{side}.weight": torch.ones(8, 8) for side in "AB"}
    with pytest.raises(AdapterRejected, match="vocabulary") as refused:
        inspect(write(tmp_path, config, tensors), base)
    assert refused.value.code == "module_unknown"


def test_pickles_beside_the_weights_are_not_looked_at(good: Path, base: BaseModel, tmp_path: Path) -> None:
    folder = write(tmp_path, *read(good))
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    (warning,) = inspect(folder, base).warnings
    assert (
        warning == "adapter_model.bin beside adapter_model.safetensors was ignored: pickled weights are"
        " never opened"
    )


# Which fields PEFT's LoraConfig had, by the release that added them; values as save_pretrained writes them.
PEFT_RELEASES: list[tuple[str, Config]] = [
    ("0.2", {"enable_lora": None, "merge_weights": False}),
    (
        "0.5",
        {
            "auto_mapping": None,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "lora_dropout": 0.05,
            "modules_to_save": None,
            "revision": None,
        },
    ),
    ("0.6", {"alpha_pattern": {}, "rank_pattern": {}}),
    ("0.7", {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"}),
    ("0.8", {"use_rslora": False}),
    ("0.9", {"use_dora": False}),
    ("0.10", {"layer_replication": None}),
    ("0.14", {"eva_config": None, "exclude_modules": None, "lora_bias": False}),
    ("0.15", {"corda_config": None, "trainable_token_indices": None}),
    ("0.16", {"qalora_group_size": 16, "use_qalora": False}),
    ("0.17", {"target_parameters": None}),
    (
        "0.18",
        {
            "alora_invocation_tokens": None,
            "arrow_config": None,
            "ensure_weight_tying": False,
            "peft_version": "0.18.0",
        },
    ),
]


@pytest.mark.parametrize("release", [release for release, _ in PEFT_RELEASES])
def test_a_config_of_every_release_of_peft_is_served(
    release: str, good: Path, base: BaseModel, tmp_path: Path
) -> None:
    config, tensors = read(good)
    kept = ("r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path", "task_type")
    fields = {name: config[name] for name in kept}
    for added, more in PEFT_RELEASES:
        fields |= more
        if added == release:
            break
    assert inspect(write(tmp_path, fields, tensors), base).warnings == ()


def test_every_field_of_the_installed_peft_with_its_default_is_served(
    good: Path, base: BaseModel, tmp_path: Path
) -> None:
    config, tensors = read(good)
    defaults = json.loads(json.dumps(LoraConfig().to_dict(), default=list))
    fields = defaults | {name: config[name] for name in ("r", "lora_alpha", "target_modules")}
    fields |= {"task_type": "CAUSAL_LM", "a_flag": False, "a_list": [], "a_dict": {}, "nothing": None}
    assert inspect(write(tmp_path, fields, tensors), base).warnings == ()


def test_an_unknown_field_and_a_size_can_be_waived(good: Path, base: BaseModel, tmp_path: Path) -> None:
    config, tensors = read(good)
    config |= {"lora_alpha": 1e6, "invocation_string": "go", "gate": 0.5}
    folder = write(tmp_path, config, tensors)
    with pytest.raises(AdapterRejected, match="'gate'") as caught:
        inspect(folder, base, waived=Waivers(implausible=True, fields=("invocation_string",)))
    assert caught.value.code == "config_unknown_field"
    named = ("gate", "invocation_string", "not there")
    with pytest.raises(AdapterRejected, match="spectral norm"):
        inspect(folder, base, waived=Waivers(fields=named))
    manifest = inspect(folder, base, waived=Waivers(implausible=True, fields=named))
    assert manifest.ignored_fields == ("gate", "invocation_string")
    assert manifest.implausible is not None
    assert "spectral norm" in manifest.implausible
    assert inspect(good, base).implausible is None


def test_every_field_of_peft_is_decided_on() -> None:
    ours = {"base_model_fingerprint"}
    others = {"unsloth_fixed"}
    harmless = peft_config.HARMLESS - others
    known = (PeftConfig.model_fields.keys() - ours) | peft_config.REFUSED.keys() | harmless
    assert {field.name for field in dataclasses.fields(LoraConfig)} == known


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pefts_own_conversion_cures_a_modified_base(init: str, base: BaseModel, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = get_peft_model(
        make_llama(),
        LoraConfig(r=4, init_lora_weights=init, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial", save_embedding_layers=False)
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    model.save_pretrained(
        tmp_path / "converted",
        save_embedding_layers=False,
        path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
    )
    assert inspect(tmp_path / "converted", base).rank == 8


def test_a_layer_that_exists_elsewhere_is_explained(good: Path, base: BaseModel, tmp_path: Path) -> None:
    """A hybrid model has attention in some layers only."""
    modules = {name: shape for name, shape in base.modules.items() if "layers.0.self_attn" not in name}
    with pytest.raises(AdapterRejected, match=r"of its layers only \[1\] have one"):
        inspect(good, dataclasses.replace(base, modules=modules))


def test_a_base_without_modules_refuses_everything(good: Path, base: BaseModel) -> None:
    with pytest.raises(AdapterRejected) as caught:
        inspect(good, dataclasses.replace(base, modules={}))
    assert caught.value.code == "module_unknown"

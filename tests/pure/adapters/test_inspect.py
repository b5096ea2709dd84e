"""Inspection against adapters that PEFT itself wrote, and against every way we know to spoil one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.errors import CURES, AdapterRejected
from adapters.inspection import inspect as inspection
from adapters.inspection import peft_config, safetensors_header, strict_json
from adapters.inspection.inspect import inspect
from adapters.inspection.peft_config import PeftConfig, read_config
from adapters.inspection.safetensors_header import MAX_HEADER_BYTES, read_header
from adapters.model import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    BaseModel,
    Coverage,
    Manifest,
    ModuleShape,
    Waivers,
    ranges,
)

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q0 = "model.layers.0.self_attn.q_proj"
K1 = "model.layers.1.self_attn.k_proj"
A0 = f"base_model.model.{Q0}.lora_A.weight"
B0 = f"base_model.model.{Q0}.lora_B.weight"

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=112,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    model.config._name_or_path = "acme/tiny-llama"
    model.name_or_path = "acme/tiny-llama"
    return model


@pytest.fixture(scope="module")
def base() -> BaseModel:
    modules = {
        name: ModuleShape(layer.in_features, layer.out_features)
        for name, layer in make_llama().named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }
    assert len(modules) == 14
    return BaseModel(
        name="acme/tiny-llama",
        modules=modules,
        max_lora_rank=16,
        fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
    )


def train(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Writes an adapter with PEFT; lora_B is random instead of trained."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(make_llama(), LoraConfig(**(options | config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter).mul(0.1).to(dtype)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("good"))


def write(folder: Path, config: Config, tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    return folder


def read(folder: Path) -> tuple[Config, Tensors]:
    return json.loads((folder / CONFIG_FILE).read_text()), load_file(folder / WEIGHTS_FILE)


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


def zero(tensors: Tensors, part: str) -> None:
    for name in tensors:
        if part in name:
            tensors[name] = torch.zeros_like(tensors[name])


def cancel(tensors: Tensors) -> None:
    """[A; A] and [B, -B]: neither is zero, their product is."""
    for name, weight in tensors.items():
        half = weight[:2] if "lora_A" in name else weight[:, :2]
        tensors[name] = torch.cat([half, half] if "lora_A" in name else [half, -half], int("lora_B" in name))


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


# --- what is refused ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bad:
    """A good adapter, spoiled: first its config and tensors, then the files as they lie in the folder."""

    code: str
    says: tuple[str, ...]
    change: Callable[[Config, Tensors], Any] = lambda config, tensors: None
    damage: Callable[[Path], Any] = lambda folder: None
    serving_dtype: str | None = None
    fingerprint: str | None = None


def field(code: str, name: str, value: Any, *says: str) -> Bad:
    return Bad(code, (name, *says), lambda config, _: config.update({name: value}))


def text(edit: Callable[[str], str | bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / CONFIG_FILE
        edited = edit(path.read_text())
        path.write_bytes(edited if isinstance(edited, bytes) else edited.encode())

    return damage


def header(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Edits the parsed header; the data stays. ``edit`` may return the header's text instead."""

    def damage(folder: Path) -> None:
        path = folder / WEIGHTS_FILE
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        parsed = json.loads(data[8 : 8 + length])
        edited = edit(parsed)
        raw = edited if isinstance(edited, bytes) else json.dumps(parsed).encode()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])

    return damage


def weights(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / WEIGHTS_FILE
        path.write_bytes(edit(path.read_bytes()))

    return damage


def rename(old: str, new: str) -> Callable[[Config, Tensors], None]:
    def change(_: Config, tensors: Tensors) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def tensor(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Config, Tensors], None]:
    def change(_: Config, tensors: Tensors) -> None:
        tensors[name] = value(tensors.get(name, torch.zeros(4, 64)))

    return change


def poison(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(weight: torch.Tensor) -> torch.Tensor:
        poisoned = weight.clone()
        poisoned[-1, -1] = value
        return poisoned

    return change


def first(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return header(lambda parsed: edit(parsed[A0]) and None)


def share_bytes(folder: Path) -> None:
    """The second tensor lies inside the first; the others move up, so that the file's size fits."""
    path = folder / WEIGHTS_FILE
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    parsed = json.loads(data[8:start])
    parsed.pop("__metadata__", None)
    first, second, *rest = sorted(parsed.values(), key=lambda entry: entry["data_offsets"])
    begin, end = second["data_offsets"]
    size = end - begin
    second["data_offsets"] = [0, size]
    for entry in rest:
        entry["data_offsets"] = [at - size for at in entry["data_offsets"]]
    assert size <= first["data_offsets"][1]
    raw = json.dumps(parsed).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[start + size :])


def declare(config: Config, _: Tensors) -> None:
    config["base_model_fingerprint"] = "aa"


def grown(factor: float, name: str) -> Callable[[Config, Tensors], Any]:
    """Multiplies one tensor: a finite one, in a float32 file."""
    return lambda _, tensors: tensors.update({name: tensors[name] * factor})


BAD: dict[str, Bad] = {
    # larger than any training makes one
    "alpha 1e38": field("adapter_implausible", "lora_alpha", 1e38, "spectral norm"),
    "alpha 1e6": field("adapter_implausible", "lora_alpha", 1e6, "spectral norm"),
    "alpha of one module": Bad(
        "adapter_implausible", ("k_proj",), lambda c, t: c.update(alpha_pattern={"k_proj": 1e7})
    ),
    "lora_B near float32's end": Bad("adapter_implausible", (Q0, "spectral norm"), grown(1e36, B0)),
    "lora_A that overflows, lora_B that undoes it": Bad(
        "adapter_implausible",
        ("row of lora_A", "float32"),
        lambda c, t: [grown(1e38, A0)(c, t), grown(1e-37, B0)(c, t)],
    ),
    "too large for float16 alone": Bad(
        "adapter_implausible",
        ("row of lora_A", "float16"),
        lambda c, t: [grown(2000, A0)(c, t), grown(1e-3, B0)(c, t)],
        serving_dtype="float16",
    ),
    # what another tool leaves behind
    "ZeRO-3 without gathering": Bad("tensor_empty", ("(0,)", "ZeRO-3"), tensor(A0, lambda t: torch.zeros(0))),
    "ZeRO-3, of rank 0": Bad("tensor_empty", ("(4, 0)", "gather"), tensor(A0, lambda t: torch.zeros(4, 0))),
    "names of mistral-finetune": Bad(
        "tensor_unknown", ("attention.wq", "mistral-finetune"), rename("self_attn.q_proj", "attention.wq")
    ),
    "names of mistral-finetune's MLP": Bad(
        "tensor_unknown", ("mistral-finetune",), rename("self_attn.k_proj", "feed_forward.w1")
    ),
    "a multimodal model's names": Bad(
        "module_prefixed",
        ("has 'model.layers.0", "language_model"),
        rename("model.layers", "model.language_model.layers"),
    ),
    "an older multimodal model's names": Bad(
        "module_prefixed",
        ("language_model",),
        rename("model.model.layers", "model.language_model.model.layers"),
    ),
    "a multimodal model's names in place of the base's": Bad(
        "module_prefixed",
        ("'language_model.layers.0.", f"has '{Q0.replace('q_', 'k_')}'"),
        rename("base_model.model.model.", "base_model.model.language_model."),
    ),
    "another multimodal model's names": Bad(
        "module_prefixed", ("language_model",), rename("model.model.layers", "model.language_model.layers")
    ),
    # fields that PEFT does not know
    "an invocation string": field(
        "config_unknown_field", "invocation_string", "<|start|>assistant", "ignore_fields"
    ),
    "another tool's flag": field("config_unknown_field", "use_nextgen_lora", True),
    "another tool's config": field("config_unknown_field", "nextgen_config", {"gate": 1}, "gate"),
    "a zero that PEFT does not know": field("config_unknown_field", "shared_scale", 0),
    "merged projections of an early PEFT": field("config_unknown_field", "enable_lora", [True, False]),
    # the config as a file
    "no config": Bad("config_invalid", ("missing",), damage=lambda f: (f / CONFIG_FILE).unlink()),
    "empty config": Bad("config_invalid", ("not valid JSON",), damage=text(lambda t: "")),
    "config too large": Bad("config_invalid", ("1048576",), damage=text(lambda t: t + " " * (1 << 20))),
    "config in UTF-16": Bad(
        "config_invalid", ("UTF-8 at byte 0",), damage=text(lambda t: t.encode("utf-16"))
    ),
    "byte order mark": Bad("config_invalid", ("BOM",), damage=text(lambda t: "\ufeff" + t)),
    "config is a list": Bad("config_invalid", ("object", "[1]"), damage=text(lambda t: "[1]")),
    "duplicate key": Bad("config_invalid", ("'r' appears twice",), damage=text(lambda t: '{"r": 8,' + t[1:])),
    "nested duplicate": Bad(
        "config_invalid", ("'x' appears twice",), damage=text(lambda t: '{"y": {"x": 1, "x": 1},' + t[1:])
    ),
    "too deep": Bad(
        "config_invalid", ("32 levels",), damage=text(lambda t: '{"y":' + "[" * 99 + "]" * 99 + "," + t[1:])
    ),
    "absurdly deep": Bad("config_invalid", ("32 levels",), damage=text(lambda t: "[" * 90_000)),
    "many items": Bad("config_invalid", ("100000 items",), damage=text(lambda t: "[" + "{}," * 110_000)),
    "NaN": Bad("config_invalid", ("NaN",), damage=text(lambda t: '{"x": NaN,' + t[1:])),
    "Infinity": Bad("config_invalid", ("-Infinity",), damage=text(lambda t: '{"x": -Infinity,' + t[1:])),
    "overflowing number": Bad("config_invalid", ("1e999",), damage=text(lambda t: '{"x": 1e999,' + t[1:])),
    "endless integer": Bad(
        "config_invalid", ("not valid JSON",), damage=text(lambda t: '{"x": ' + "9" * 5000 + "," + t[1:])
    ),
    "half a surrogate": Bad(
        "config_invalid", ("surrogate",), damage=text(lambda t: '{"\\ud800": 1,' + t[1:])
    ),
    "NUL": field("config_invalid", "base_model_name_or_path", "a\0b", "NUL"),
    # the config's fields
    "no peft_type": Bad("not_lora", ("None",), lambda c, t: c.pop("peft_type")),
    "IA3": field("not_lora", "peft_type", "IA3", "IA3"),
    "no r": Bad("config_invalid", ("r: Field required",), lambda c, t: c.pop("r")),
    "no lora_alpha": Bad("config_invalid", ("lora_alpha: Field required",), lambda c, t: c.pop("lora_alpha")),
    "no target_modules": Bad("config_invalid", ("target_modules",), lambda c, t: c.pop("target_modules")),
    "r is 0": field("config_invalid", "r", 0, "found 0"),
    "r is true": field("config_invalid", "r", True, "found True"),
    "r is 4.0": field("config_invalid", "r", 4.0, "found 4.0"),
    "r is text": field("config_invalid", "r", "4", "found '4'"),
    "alpha is true": field("config_invalid", "lora_alpha", True, "found True"),
    "alpha is text": field("config_invalid", "lora_alpha", "8", "found '8'"),
    "alpha is null": field("config_invalid", "lora_alpha", None, "found None"),
    "alpha is beyond floats": field("config_invalid", "lora_alpha", 10**400, "found 1000"),
    "alpha is negative": field("config_invalid", "lora_alpha", -8, "-8"),
    "alpha is 0": field("alpha_zero", "lora_alpha", 0),
    "alpha is -0.0": field("alpha_zero", "lora_alpha", -0.0),
    "no list of target_modules": field("config_invalid", "target_modules", None, "found None"),
    "not targeted": field("target_mismatch", "target_modules", ["q_proj"], K1),
    "targeted by another full name": field(
        "target_mismatch", "target_modules", "model.layers.0.self_attn.v_proj", Q0
    ),
    "excluded": field("target_mismatch", "exclude_modules", ["k_proj"], K1),
    "excluded by its full name": field("target_mismatch", "exclude_modules", K1, K1),
    "another layer": field("target_mismatch", "layers_to_transform", [1], Q0),
    "no layer of that pattern": Bad(
        "target_mismatch", (Q0,), lambda c, t: c.update(layers_to_transform=[0, 1], layers_pattern=["h"])
    ),
    "filled at random": Bad(
        "target_mismatch",
        ("'model.layers.0.self_attn.v_proj'", "random"),
        lambda c, t: c.update(init_lora_weights=False, target_modules=["q_proj", "k_proj", "v_proj"]),
    ),
    "another base by fingerprint": Bad("base_mismatch", ("'aa'", "tiny-llama"), declare, fingerprint="bb"),
    "endless pattern": field("pattern_too_long", "rank_pattern", {"x" * 600: 4}, "600", "512"),
    "alpha_pattern has 0": field("alpha_zero", "alpha_pattern", {"q_proj": 0}, "'q_proj'"),
    "alpha_pattern has a negative": field(
        "config_invalid", "alpha_pattern", {"q_proj": -1}, "'q_proj'", "-1"
    ),
    "alpha_pattern has text": field(
        "config_invalid", "alpha_pattern", {"q_proj": "x"}, "q_proj", "found 'x'"
    ),
    "rank_pattern has 0": field("config_invalid", "rank_pattern", {"q_proj": 0}, "q_proj", "found 0"),
    "rank_pattern has true": field(
        "config_invalid", "rank_pattern", {"q_proj": True}, "q_proj", "found True"
    ),
    "rank_pattern is a list": field("config_invalid", "rank_pattern", [1], "found [1]"),
    "target_modules has a number": field("config_invalid", "target_modules", ["q_proj", 3], "found 3"),
    "use_rslora is text": field("config_invalid", "use_rslora", "no", "found 'no'"),
    "base model is a number": field("config_invalid", "base_model_name_or_path", 3, "found 3"),
    "base model is a novel": field("config_invalid", "base_model_name_or_path", "x" * 2000, "1024"),
    "DoRA": field("dora_unsupported", "use_dora", True, "True"),
    "bias all": field("bias_unsupported", "bias", "all", "'all'"),
    "bias null": field("bias_unsupported", "bias", None, "None"),
    "lora_bias": field("bias_unsupported", "lora_bias", True),
    "modules_to_save": field("modules_to_save_unsupported", "modules_to_save", ["lm_head"], "lm_head"),
    "classifier": field("modules_to_save_unsupported", "modules_to_save", ["score"], "score"),
    **{
        init: field("init_unsupported", "init_lora_weights", init, init)
        for init in ("pissa", "PiSSA", "pissa_niter_4", "olora", "corda", "loftq", "of the future")
    },
    "trained tokens": field("feature_unsupported", "trainable_token_indices", [1, 2], "[1, 2]"),
    "trained tokens by name": field("feature_unsupported", "trainable_token_indices", {"embed_tokens": [1]}),
    "target_parameters": field("feature_unsupported", "target_parameters", ["experts.up"], "experts.up"),
    "layer_replication": field(
        "feature_unsupported", "layer_replication", [[0, 2], [1, 2]], "[[0, 2], [1, 2]]"
    ),
    "ensure_weight_tying": field("feature_unsupported", "ensure_weight_tying", True),
    "fan_in_fan_out": field("feature_unsupported", "fan_in_fan_out", True),
    "QALoRA": field("feature_unsupported", "use_qalora", True),
    "aLoRA": field("feature_unsupported", "alora_invocation_tokens", [5]),
    "aLoRA without tokens": field("feature_unsupported", "alora_invocation_tokens", []),
    "BD-LoRA": field("feature_unsupported", "use_bdlora", {"nblocks": 2}),
    "Arrow": field("feature_unsupported", "arrow_config", {}),
    "KaSA": field("feature_unsupported", "kasa_config", {"beta": 1e-4}),
    "Monteclora": field("feature_unsupported", "monteclora_config", {}),
    "Megatron": field("feature_unsupported", "megatron_config", {"tp": 2}),
    "r too large": field("rank_too_large", "r", 32, "32", "16"),
    "rank_pattern too large": field("rank_too_large", "rank_pattern", {"v_proj": 64}, "'v_proj'", "64", "16"),
    "rank_pattern expression": field("pattern_not_literal", "rank_pattern", {"(a|a)*b": 4}, "(a|a)*b"),
    "anchored pattern": field("pattern_not_literal", "rank_pattern", {"^model.layers.0": 4}, "^model"),
    "alpha_pattern expression": field("pattern_not_literal", "alpha_pattern", {".*q_proj": 4}, ".*q_proj"),
    "empty pattern": field("pattern_not_literal", "alpha_pattern", {"": 4}, "''"),
    "wildcard dot": field("pattern_not_literal", "alpha_pattern", {"q.proj": 4}, "'q.proj'", "'q_proj'"),
    "too many patterns": Bad(
        "pattern_too_long",
        ("260", "250"),
        lambda c, t: c.update(
            rank_pattern={f"a{n}": 4 for n in range(200)}, alpha_pattern={f"a{n}": 4 for n in range(60, 260)}
        ),
    ),
    # the weights as a file
    "no weights": Bad("weights_invalid", ("missing",), damage=lambda f: (f / WEIGHTS_FILE).unlink()),
    "empty weights": Bad("weights_invalid", ("0 bytes",), damage=weights(lambda d: b"")),
    "a pickle beside": Bad(
        "weights_not_safetensors",
        ("adapter_model.bin",),
        damage=lambda f: os.rename(f / WEIGHTS_FILE, f / "adapter_model.bin"),
    ),
    "a zip inside": Bad(
        "weights_not_safetensors",
        ("PK",),
        damage=lambda f: torch.save({"x": torch.ones(3)}, f / WEIGHTS_FILE),
    ),
    "a pickle inside": Bad(
        "weights_not_safetensors",
        (r"\x80",),
        damage=lambda f: torch.save({}, f / WEIGHTS_FILE, _use_new_zipfile_serialization=False),
    ),
    "a pointer of Git LFS": Bad(
        "weights_invalid",
        ("git lfs pull",),
        damage=weights(lambda d: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    ),
    "a GGUF": Bad("weights_invalid", ("GGUF",), damage=weights(lambda d: b"GGUF" + d)),
    "a web page": Bad("weights_invalid", ("web page",), damage=weights(lambda d: b"<!DOCTYPE html><html>")),
    "truncated": Bad("weights_invalid", ("bytes",), damage=weights(lambda d: d[:-1])),
    "trailing bytes": Bad("weights_invalid", ("bytes",), damage=weights(lambda d: d + b"\0")),
    "only a header": Bad("weights_invalid", ("bytes",), damage=weights(lambda d: d[:40])),
    "huge header": Bad(
        "weights_invalid",
        (str(MAX_HEADER_BYTES), str(MAX_HEADER_BYTES + 1)),
        damage=header(lambda p: json.dumps(p).encode().ljust(MAX_HEADER_BYTES + 1)),
    ),
    "header longer than the file": Bad(
        "weights_invalid",
        ("claims 99999 bytes",),
        damage=weights(lambda d: struct.pack("<Q", 99_999) + d[8:]),
    ),
    "header is a list": Bad("weights_invalid", ("not a JSON object",), damage=header(lambda p: b"[1]")),
    "header is broken": Bad("weights_invalid", ("not valid",), damage=header(lambda p: b'{"a": ')),
    "header repeats a key": Bad(
        "weights_invalid",
        (A0, "twice"),
        damage=header(lambda p: (json.dumps({A0: 1})[:-1] + "," + json.dumps(p)[1:]).encode()),
    ),
    "metadata is nested": Bad(
        "weights_invalid", ("__metadata__",), damage=header(lambda p: p.update(__metadata__={"a": 1}))
    ),
    "no tensors": Bad(
        "weights_invalid", ("0 tensors",), damage=weights(lambda d: struct.pack("<Q", 2) + b"{}")
    ),
    "entry is a list": Bad("weights_invalid", (A0,), damage=header(lambda p: p.update({A0: []}))),
    "entry has more": Bad("weights_invalid", (A0,), damage=first(lambda e: e.update(device="cpu"))),
    "dtype is a number": Bad("weights_invalid", (A0, "32"), damage=first(lambda e: e.update(dtype=32))),
    "shape is negative": Bad(
        "weights_invalid", (A0, "[-4, -64]"), damage=first(lambda e: e.update(shape=[-4, -64]))
    ),
    "shape has true": Bad(
        "weights_invalid", (A0, "True"), damage=first(lambda e: e.update(shape=[True, 256]))
    ),
    "shape is fractional": Bad(
        "weights_invalid", (A0, "4.0"), damage=first(lambda e: e.update(shape=[4.0, 64]))
    ),
    "shape disagrees": Bad(
        "weights_invalid", (A0, "1280", "1024"), damage=first(lambda e: e.update(shape=[5, 64]))
    ),
    "offsets run backwards": Bad(
        "weights_invalid", (A0, "data_offsets"), damage=first(lambda e: e["data_offsets"].reverse())
    ),
    "offsets overlap": Bad(
        "weights_invalid",
        ("begins at byte",),
        damage=header(lambda p: p[A0].update(data_offsets=p[B0]["data_offsets"])),
    ),
    "offsets leave a gap": Bad(
        "weights_invalid",
        ("begins at byte 4",),
        damage=header(
            lambda p: [
                e.update(data_offsets=[n + 4 for n in e["data_offsets"]])
                for k, e in p.items()
                if k != "__metadata__"
            ]
        ),
    ),
    "two tensors share their bytes": Bad("weights_invalid", ("begins at byte 0 ",), damage=share_bytes),
    "float64": Bad("dtype_unsupported", (A0, "'F64'", "F32"), tensor(A0, torch.Tensor.double)),
    "int8": Bad("dtype_unsupported", (A0, "'I8'"), tensor(A0, lambda t: t.to(torch.int8))),
    # the tensors' names
    "adapter name inside": Bad(
        "tensor_unknown", ("lora_A.default.weight",), rename("lora_A.weight", "lora_A.default.weight")
    ),
    "embedding adapter": Bad(
        "module_unknown",
        ("embed_tokens", "vocabulary"),
        tensor("base_model.model.model.embed_tokens.lora_embedding_A", lambda t: t),
    ),
    "base weight": Bad(
        "tensor_unknown",
        ("embed_tokens", "base model"),
        tensor("base_model.model.model.embed_tokens.base_layer.weight", lambda t: t),
    ),
    "DoRA's magnitude": Bad(
        "dora_unsupported",
        ("lora_magnitude_vector",),
        tensor(f"base_model.model.{Q0}.lora_magnitude_vector", lambda t: t),
    ),
    "lora_B's bias": Bad(
        "bias_unsupported", ("lora_B.bias",), tensor(f"base_model.model.{Q0}.lora_B.bias", lambda t: t)
    ),
    "a full layer": Bad(
        "modules_to_save_unsupported",
        ("lm_head.weight",),
        tensor("base_model.model.lm_head.weight", lambda t: t),
    ),
    "a layer to save": Bad(
        "modules_to_save_unsupported",
        ("lm_head",),
        tensor("base_model.model.lm_head.modules_to_save.weight", lambda t: t),
    ),
    "a trained token": Bad(
        "feature_unsupported",
        ("token_adapter",),
        tensor("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", lambda t: t),
    ),
    "KaSA's diagonal": Bad(
        "feature_unsupported", ("lora_diag",), tensor(f"base_model.model.{Q0}.lora_diag", lambda t: t)
    ),
    "a name of another trainer": Bad("tensor_unknown", ("lora_down",), rename("lora_A", "lora_down")),
    "a name of diffusers": Bad("tensor_unknown", ("diffusers",), rename("lora_A", "lora.down")),
    "a name of Megatron": Bad("tensor_unknown", ("Megatron",), rename("lora_A", "adapter.linear_in")),
    "no lora_A": Bad("tensor_unpaired", (B0, "lora_A"), lambda c, t: t.pop(A0)),
    "no lora_B": Bad("tensor_unpaired", (A0, "lora_B"), lambda c, t: t.pop(B0)),
    "twice, with and without prefix": Bad(
        "weights_invalid",
        (A0, f"'{Q0}.lora_A.weight'"),
        lambda c, t: t.update({f"{Q0}.lora_A.weight": t[A0].clone()}),
    ),
    # the modules
    "lm_head adapter": Bad(
        "module_unknown",
        ("'lm_head'", "it has"),
        tensor("base_model.model.lm_head.lora_A.weight", lambda t: t),
    ),
    "another architecture": Bad(
        "module_unknown", ("attn.c_attn", "it has down_proj"), rename("self_attn.q_proj", "attn.c_attn")
    ),
    "a slip in the name": Bad(
        "module_unknown", ("q_projj", "did you mean q_proj?"), rename("q_proj", "q_projj")
    ),
    "another prefix": Bad(
        "module_unknown",
        ("'text_model.layers.0.", f"did you mean '{Q0.replace('q_', 'k_')}'"),
        rename("base_model.model.model.", "base_model.model.text_model."),
    ),
    "a prefix too many": Bad(
        "module_unknown", ("did you mean",), rename("base_model.model.", "base_model.model.base_model.model.")
    ),
    "a layer too many": Bad("module_unknown", ("layers.7", "has 2 layers"), rename("layers.1.", "layers.7.")),
    "fused": Bad("module_fused", ("qkv_proj", "q_proj, k_proj, v_proj"), rename("q_proj", "qkv_proj")),
    # the shapes
    "one-dimensional": Bad("shape_mismatch", (A0, "1 dimensions"), tensor(A0, torch.flatten)),
    "three-dimensional": Bad("shape_mismatch", (B0, "3 dimensions"), tensor(B0, lambda t: t[None])),
    "in_features too small": Bad(
        "shape_mismatch", (A0, "(4, 32)", "(rank, 64)"), tensor(A0, lambda t: t[:, :32])
    ),
    "in_features too large": Bad(
        "shape_mismatch", (A0, "(4, 128)", "(rank, 64)"), tensor(A0, lambda t: t.repeat(1, 2))
    ),
    "out_features too small": Bad(
        "shape_mismatch", (B0, "(63, 4)", "(64, rank)"), tensor(B0, lambda t: t[1:])
    ),
    "transposed": Bad("shape_mismatch", (A0, "(64, 4)", "(rank, 64)"), tensor(A0, lambda t: t.T)),
    "config has another r": field("rank_mismatch", "r", 8, "rank 4", "says 8"),
    "rank_pattern disagrees": Bad(
        "rank_mismatch", (K1, "rank 4", "says 2"), lambda c, t: c.update(rank_pattern={K1: 2})
    ),
    "A and B disagree": Bad("rank_mismatch", (B0, "rank 3", "says 4"), tensor(B0, lambda t: t[:, :3])),
    # the values
    "NaN in A": Bad("weights_not_finite", (A0, "NaN"), tensor(A0, poison(math.nan))),
    "infinity in B": Bad("weights_not_finite", (B0, "infinity"), tensor(B0, poison(-math.inf))),
    "too large for float16": Bad(
        "weights_not_finite",
        (A0, "1e+06", "float16", "6.55e+04"),
        tensor(A0, poison(1e6)),
        serving_dtype="float16",
    ),
    "too large once scaled": Bad(
        "weights_not_finite",
        (B0, "4e+04", "scaling 2", "float16"),
        tensor(B0, poison(4e4)),
        serving_dtype="float16",
    ),
    "too large for its own type": Bad(
        "weights_not_finite", (B0, "3e+38", "float32"), tensor(B0, poison(3e38))
    ),
    "untrained": Bad("adapter_no_effect", ("4 modules",), lambda c, t: zero(t, "lora_B")),
    "A of zeros": Bad("adapter_no_effect", ("4 modules",), lambda c, t: zero(t, "lora_A")),
    "B and A cancel out": Bad("adapter_no_effect", ("4 modules",), lambda c, t: cancel(t)),
    "vanishes in float16": Bad(
        "adapter_no_effect",
        ("4 modules",),
        lambda c, t: t.update({name: weight * 1e-9 for name, weight in t.items() if "lora_B" in name}),
        serving_dtype="float16",
    ),
}

# "r" stands in a rank mismatch's message as "rank", not as the name of the field.
SPOILED_ELSEWHERE = {"config has another r", "NUL"}


def refusal(bad: Bad, good: Path, base: BaseModel, folder: Path) -> AdapterRejected:
    config, tensors = read(good)
    bad.change(config, tensors)
    write(folder, config, tensors)
    bad.damage(folder)
    with pytest.raises(AdapterRejected) as caught:
        inspect(
            folder, dataclasses.replace(base, fingerprint=bad.fingerprint), serving_dtype=bad.serving_dtype
        )
    return caught.value


@pytest.mark.parametrize("name", BAD)
def test_a_spoiled_adapter_is_refused_by_name(name: str, good: Path, base: BaseModel, tmp_path: Path) -> None:
    bad = BAD[name]
    error = refusal(bad, good, base, tmp_path)
    assert error.code == bad.code, error.message
    says = bad.says[1:] if name in SPOILED_ELSEWHERE else bad.says
    assert all(fragment in error.message for fragment in says), error.message
    assert error.message.endswith(CURES[bad.code])
    assert "\n" not in error.message
    assert len(error.message) < 600
    assert error.param is not None


def test_every_code_of_an_inspection_has_a_case() -> None:
    sources = [Path(module.__file__).read_text() for module in (inspection, peft_config, safetensors_header)]
    raised = {code for code in CURES if any(f'"{code}"' in source for source in sources)}
    assert {bad.code for bad in BAD.values()} == raised


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


# --- random input ---------------------------------------------------------------------------------------

FUZZ = settings(
    max_examples=int(os.environ.get("LORAPLEX_FUZZ_EXAMPLES", "300")),
    deadline=10_000,
    derandomize="LORAPLEX_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["q_proj", K1, "LORA", "none", "gaussian"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def edits(draw: st.DrawFn, length: int = 4096) -> list[tuple[int, int, bytes]]:
    """Cuts and insertions: (position, bytes removed, bytes put there)."""
    at = st.integers(0, length)
    return draw(
        st.lists(st.tuples(at, st.integers(0, 40) | at, st.binary(max_size=24)), min_size=1, max_size=4)
    )


def edited(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for at, removed, put in changes:
        data = data[:at] + put + data[at + removed :]
    return data


def only_rejected(call: Callable[[], Any]) -> None:
    refused: AdapterRejected | None = None
    try:
        call()
    except AdapterRejected as error:
        refused = error
    if refused is not None:
        assert refused.message.endswith(CURES[refused.code])
        refused.message.encode()


@FUZZ
@given(data=st.binary(max_size=400) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_config_is_read_or_refused(data: bytes, base: BaseModel, tmp_path: Path) -> None:
    path = tmp_path / CONFIG_FILE
    path.write_bytes(data)
    only_rejected(lambda: read_config(path, base))


@FUZZ
@given(changes=edits(1200))
def test_any_damage_to_a_config_is_read_or_refused(
    changes: list[tuple[int, int, bytes]], good: Path, base: BaseModel, tmp_path: Path
) -> None:
    path = tmp_path / CONFIG_FILE
    path.write_bytes(edited((good / CONFIG_FILE).read_bytes(), changes))
    only_rejected(lambda: read_config(path, base))


@FUZZ
@given(
    data=st.binary(max_size=300)
    | st.dictionaries(st.text(max_size=12), json_values, max_size=3).map(
        lambda value: (raw := json.dumps(value).encode()) and struct.pack("<Q", len(raw)) + raw
    )
)
def test_any_weights_are_read_or_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(data)
    only_rejected(lambda: read_header(path))


@FUZZ
@given(changes=edits(1600), fix_length=st.booleans())
def test_any_damage_to_weights_is_read_as_safetensors_reads_it(
    changes: list[tuple[int, int, bytes]], fix_length: bool, good: Path, base: BaseModel, tmp_path: Path
) -> None:
    shutil.copy(good / CONFIG_FILE, tmp_path)
    path = tmp_path / WEIGHTS_FILE
    data = (good / WEIGHTS_FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    if fix_length:
        raw = edited(data[8 : 8 + length], changes)
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])
    else:
        path.write_bytes(edited(data, changes))
    only_rejected(lambda: inspect(tmp_path, base, serving_dtype="float16"))
    try:
        header = read_header(path)
    except AdapterRejected:
        return
    assert {name: tensor.shape for name, tensor in header.items()} == {
        name: tuple(tensor.shape) for name, tensor in load_file(path).items()
    }


HOSTILE_HEADERS: dict[str, Callable[[int], bytes]] = {
    "lists": lambda size: b'{"a":' + b"[" * (size - 5),
    "objects": lambda size: b'{"a":[' + b"{}," * (size // 3 - 4) + b"{}]}",
    "integers": lambda size: b'{"a":[' + b"1," * (size // 2 - 5) + b"1]}",
    "strings": lambda size: b'{"a":[' + b'"",' * (size // 3 - 5) + b'""]}',
    "digits": lambda size: b'{"a":' + b"9" * (size - 6) + b"}",
    "blanks": lambda size: b"{" + b" " * (size - 2) + b"}",
    "one name": lambda size: b'{"' + b"x" * (size - 6) + b'":1}',
}


@pytest.mark.parametrize("name", HOSTILE_HEADERS)
def test_the_largest_header_is_refused_in_bounded_time(name: str, tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_FILE
    raw = HOSTILE_HEADERS[name](MAX_HEADER_BYTES)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    started = time.process_time()
    with pytest.raises(AdapterRejected) as caught:
        read_header(path)
    assert time.process_time() - started < 5
    assert caught.value.code == "weights_invalid"
    assert len(caught.value.message) < 600


@pytest.mark.parametrize("value", ["x" * 10_000, {"a": ["\ud800\0"] * 99}, 10**4000])
def test_show_is_short_and_printable(value: object) -> None:
    assert len(strict_json.show(value)) <= 120
    assert strict_json.show(value).isprintable()
    strict_json.show(value).encode()

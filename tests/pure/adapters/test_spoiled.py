"""Every way we know to spoil an adapter is refused by its name."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from pathlib import Path

import pytest
import torch

from adapters.errors import CURES, AdapterRejected
from adapters.inspection import inspect as inspection
from adapters.inspection import peft_config, safetensors_header
from adapters.inspection.inspect import inspect
from adapters.inspection.safetensors_header import MAX_HEADER_BYTES
from adapters.model import CONFIG_FILE, WEIGHTS_FILE, BaseModel
from tests.support.peft_adapters import A0, B0, K1, Q0, base, good, read, write
from tests.support.spoiled import (
    Bad,
    cancel,
    declare,
    field,
    first,
    grown,
    header,
    poison,
    rename,
    share_bytes,
    tensor,
    text,
    weights,
    zero,
)

__all__ = ["base", "good"]

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
    "not what the expression targets": field("target_mismatch", "target_modules", r".*\.v_proj", Q0),
    "what the expression excludes": field("target_mismatch", "exclude_modules", r".*\.q_proj", Q0),
    "no expression": field("target_mismatch", "target_modules", ".*(q_proj"),
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

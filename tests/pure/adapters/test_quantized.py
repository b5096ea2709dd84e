"""Quantized bases, offline: what their few bits mean, and what doctor, merge and probes make of them."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapters.errors import AdapterRejected
from adapters.inspection.base_model import quantized_as, read_base
from adapters.inspection.inspect import inspect
from adapters.inspection.quantized import UnknownQuantization, quantization_of, shape_of, weight_of
from adapters.inspection.quantized_names import bits_in, parse, without_bits
from adapters.model import BaseModel
from adapters.offline.dequantize import INDEX_FILE, Checkpoint, dequantize, load
from adapters.offline.doctor import diagnose
from adapters.offline.merge import Merge, MergeError
from adapters.offline.reference import golden
from server.engine.quantization import refuse
from tests.support.families import FAMILIES
from tests.support.quantized import KINDS, make_plain, quantize
from tests.support.trainer import SIZES, Base, breed, build, read, write
from tests.support.truth import PROMPT
from tests.support.zoo import Specimen

ADAPTED = Specimen({"target_modules": "all-linear"})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plain(tmp_path_factory.mktemp("plain") / "base").folder


@pytest.fixture(scope="module")
def trained(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bred(Base(plain), tmp_path_factory.mktemp("trained"))


def logits(model: object) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(torch.tensor([PROMPT])).logits  # type: ignore[attr-defined]
    return found


def bred(base: Base, folder: Path) -> Path:
    breed(base, "on a quantized base", ADAPTED, folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_means_what_was_rounded(kind: str, plain: Path, tmp_path: Path) -> None:
    meant = load_file(quantize(plain, kind, tmp_path / "few").folder / "model.safetensors")
    with Checkpoint(tmp_path / "few") as checkpoint:
        found = dict(checkpoint.weights())
    assert found.keys() == meant.keys()
    assert all(torch.equal(found[name].float(), meant[name]) for name in meant)


@pytest.mark.parametrize("kind", ["GPTQ", "FP8 by tensor"])
def test_a_base_is_read_and_merged_as_what_its_bits_mean(kind: str, plain: Path, tmp_path: Path) -> None:
    few, out = tmp_path / "few", tmp_path / "out"
    reference = quantize(plain, kind, few)
    adapter = bred(reference, tmp_path / "adapter")
    base = read_base(few, max_lora_rank=64)
    assert base.quantized == {"GPTQ": "gptq w4a16", "FP8 by tensor": "fp8"}[kind]
    assert not base.dora
    assert base.modules == read_base(plain, max_lora_rank=64).modules
    assert base.fingerprint not in (None, read_base(plain, max_lora_rank=64).fingerprint)
    assert diagnose(adapter, base, serving_dtype="bfloat16").error is None
    with (
        pytest.raises(MergeError, match=r"is quantized .* --dequantize"),
        Merge(few, base, adapter, out) as m,
    ):
        m.run()
    assert not out.exists()
    with Merge(few, base, adapter, out, dequantize="float32") as merging:
        assert merging.run() == 21
        merging.keep()
    want = logits(PeftModel.from_pretrained(reference.fresh(), adapter))
    assert torch.allclose(logits(load(out)), want, atol=1e-4)
    assert quantization_of(out) is None
    (probe,) = [
        one
        for one in golden(_with_tokenizer(few), adapter, ["the of and"], tolerance=0.1).probes
        if one.log_probs
    ]
    assert len(probe.log_probs) == len(probe.prompt) - 1


def _with_tokenizer(folder: Path) -> Path:
    for path in (folder / "tokenizer").iterdir():
        path.rename(folder / path.name)
    return folder


def test_shards_and_their_index_are_written_anew(plain: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    meant = quantize(plain, "AWQ", few)
    tensors = load_file(few / "model.safetensors")
    (few / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, of in halves.items():  # a layer's tensors lie in both
        save_file({name: tensors[name] for name in of}, few / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, of in halves.items() for name in of}}
    (few / INDEX_FILE).write_text(json.dumps(index))
    (few / "quantize_config.json").write_text("{}")
    assert dequantize(few, tmp_path / "out", dtype="float32") == 21
    written = json.loads((tmp_path / "out" / INDEX_FILE).read_text())["weight_map"]
    assert written.keys() == load_file(meant.folder / "model.safetensors").keys()
    assert torch.allclose(logits(load(tmp_path / "out")), logits(meant.fresh()), atol=1e-4)
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    with pytest.raises(FileExistsError):
        dequantize(few, tmp_path / "out")
    with pytest.raises(ValueError, match="not quantized"):
        dequantize(plain, tmp_path / "other")


def test_the_soft_caps_of_gemma_2_are_part_of_what_is_compared_with(tmp_path: Path) -> None:
    config = FAMILIES["gemma2"].make_config(SIZES)
    config.attn_logit_softcapping = 0.5
    folder = build(config, tmp_path / "base").folder
    eager = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    usual = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    assert torch.equal(logits(load(folder)), logits(eager))
    assert not torch.allclose(logits(usual), logits(eager), atol=1e-3)


@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_of_bitsandbytes_are_places_in_a_table(nested: bool) -> None:
    """As its 0.50 reads them: the high half of a byte first, a scale for 64 numbers, itself in eight bits."""
    rows, columns = 16, 128
    generator = torch.Generator().manual_seed(1)
    table = torch.linspace(-1, 1, 16)
    places = torch.randint(0, 16, (rows, columns), generator=generator)
    scales = torch.rand(rows * columns // 64, generator=generator) + 0.5
    state: dict[str, object] = {"shape": [rows, columns], "blocksize": 64, "quant_type": "nf4"}
    layer = {"weight": (places[:, ::2] * 16 + places[:, 1::2]).to(torch.uint8).reshape(-1, 1)}
    layer |= {"weight.quant_map": table, "weight.absmax": scales}
    if nested:
        codes, of_blocks = torch.rand(256, generator=generator), torch.rand(2, generator=generator)
        short = torch.randint(0, 256, scales.shape, generator=generator).to(torch.uint8)
        state |= {"nested_blocksize": 16, "nested_offset": 0.25}
        scales = codes[short.long()] * of_blocks.repeat_interleave(16) + 0.25
        layer |= {"weight.absmax": short, "weight.nested_absmax": of_blocks}
        layer |= {"weight.nested_quant_map": codes}
    noted = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    layer["weight.quant_state.bitsandbytes__nf4"] = noted
    want = (table[places].view(-1, 64) * scales[:, None]).view(rows, columns)
    quantization = {"quant_method": "bitsandbytes"}
    assert torch.equal(weight_of(layer.get, quantization), want)
    assert shape_of(lambda _: None, layer.get, quantization) == (rows, columns)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    packed = {"weight_packed": torch.zeros(4, 8, dtype=torch.uint8), "weight_scale": torch.ones(4, 1)}
    with pytest.raises(UnknownQuantization, match="use the checkpoint that was quantized"):
        weight_of(packed.get, {"quant_method": "compressed-tensors"})
    three = {"qweight": torch.zeros(3, 8), "scales": torch.ones(1, 8), "qzeros": torch.zeros(1, 1)}
    with pytest.raises(UnknownQuantization, match="gptq of 3 bits"):
        weight_of(three.get, {"quant_method": "gptq", "bits": 3})


@pytest.mark.parametrize(
    ("kind", "dtype", "amx", "says"),
    [
        ("w4a16", "float32", True, "bfloat16 or float16 on a CPU"),
        ("GPTQ", "float32", False, "bfloat16 or float16 on a CPU"),
        ("AWQ", "float", False, "bfloat16 or float16 on a CPU"),
        ("FP8 by tensor", "auto", False, "needs a processor with AMX"),
        ("FP8 by block", "bfloat16", False, "needs a processor with AMX"),
        ("w4a16", "auto", False, None),
        ("w4a16, asymmetric", "bfloat16", False, None),
        ("w8a8", "float32", False, None),
        ("FP8 by channel", "float32", False, None),
        ("FP8 by tensor", "auto", True, None),
    ],
)
def test_a_base_without_a_kernel_is_refused_before_it_is_loaded(
    kind: str, dtype: str, amx: bool, says: str | None
) -> None:
    quantization = KINDS[kind][0]
    refuse(quantization, dtype=dtype, on_cpu=False, amx=amx)
    with pytest.raises(ValueError, match=says) if says else nullcontext():
        refuse(quantization, dtype=dtype, on_cpu=True, amx=amx)


def test_what_vllm_serves_nowhere_and_eight_packed_bits_are_refused() -> None:
    for on_cpu in (True, False):
        with pytest.raises(ValueError, match="loraplex dequantize"):
            refuse({"quant_method": "bitsandbytes"}, dtype="auto", on_cpu=on_cpu, amx=True)
    with pytest.raises(ValueError, match="eight bits"):
        refuse({"quant_method": "gptq", "bits": 8}, dtype="auto", on_cpu=True, amx=True)


def test_bits_are_those_that_a_config_says() -> None:
    found = {kind: str(bits_in(config)) for kind, (config, _) in KINDS.items()}
    assert found["w4a16"] == "compressed-tensors w4a16"
    assert found["w8a8"] == "compressed-tensors w8a8"
    assert found["AWQ"] == "awq w4a16"
    assert found["FP8 by channel"] == "compressed-tensors fp8"
    assert str(bits_in({"quant_method": "bitsandbytes", "load_in_4bit": True})) == "bitsandbytes w4"
    assert str(bits_in({"quant_method": "modelopt", "quant_algo": "NVFP4"})) == "modelopt nvfp4"
    assert str(bits_in({"quant_method": "mxfp4"})) == "mxfp4"
    assert all(str(parse(text)) == text for text in found.values())


@pytest.mark.parametrize(
    ("named", "served", "quantized", "says"),
    [
        ("org/m-bnb-4bit", "m", None, "trained on a quantized copy"),
        ("org/m-AWQ", "m", None, "trained on a quantized copy"),
        ("org/m-quantized.w4a16", "m", None, "trained on a quantized copy"),
        ("org/m", "m", "gptq", "served on a quantized copy (gptq)"),
        ("org/m", "m-FP8", None, "served on a quantized copy (fp8)"),
        ("org/m-bnb-4bit", "m", "awq", "quantized in another way (awq)"),
        ("org/m-GPTQ-Int4", "m", "gptq", None),
        ("org/m-FP8-dynamic", "m-FP8-dynamic", "compressed-tensors", None),
        ("org/m-FP8-dynamic", "m", "compressed-tensors fp8", None),
        ("org/m-quantized.w4a16", "m", "compressed-tensors w4a16", None),
        ("org/m-quantized.w4a16", "m", "compressed-tensors w8a8", "in another way (compressed-tensors w8a8)"),
        ("org/m-quantized.w4a16", "m-quantized.w8a8", None, "in another way (compressed-tensors w8a8)"),
        ("org/m-GPTQ-Int4", "m", "gptq w8a16", "in another way (gptq w8a16)"),
        ("org/m-GPTQ-Int8", "m", "gptq w8a16", None),
        ("org/m-GPTQ", "m", "gptq w8a16", None),
        ("org/m-AWQ", "m", "awq w4a16", None),
        ("org/m-NVFP4", "m", "modelopt nvfp4", None),
        ("org/m-NVFP4", "m", None, "trained on a quantized copy"),
        ("org/m-MXFP4", "m", "mxfp4", None),
        ("org/m-HQQ-4bit", "m", "gptq w4a16", "in another way (gptq w4a16)"),
        ("org/m-GGUF", "m", None, "trained on a quantized copy"),
        ("org/m", "m", None, None),
        ("org/m", "org/m", "gptq w4a16", None),
        ("org/m", "/hub/models--Org--m/snapshots/1f", "awq w4a16", None),
        (
            "org/m",
            "/hub/models--other--m/snapshots/1f",
            "awq w4a16",
            "on a quantized copy (awq w4a16)",
        ),
        ("other/m", "org/m", "awq w4a16", "on a quantized copy (awq w4a16)"),
        ("/a/m", "/a/m", "awq w4a16", "on a quantized copy (awq w4a16)"),
        ("./m", "./m", "awq w4a16", "on a quantized copy (awq w4a16)"),
    ],
)
def test_other_bits_than_in_training_are_said(
    named: str,
    served: str,
    quantized: str | None,
    says: str | None,
    plain: Path,
    trained: Path,
    tmp_path: Path,
) -> None:
    base: BaseModel = dataclasses.replace(
        read_base(plain, max_lora_rank=64), name=served, source=served, quantized=quantized
    )
    config, tensors = read(trained)
    write(tmp_path, {**config, "base_model_name_or_path": named}, tensors)
    warnings = inspect(tmp_path, base).warnings
    assert len(warnings) == (says is not None)
    assert says is None or says in warnings[0]


@pytest.mark.parametrize(
    ("kind", "quantization", "named", "says"),
    [
        ("gpt_oss", {"quant_method": "mxfp4"}, "openai/gpt-oss-20b", None),
        ("gpt_oss", {"quant_method": "mxfp4"}, "unsloth/gpt-oss-20b-BF16", None),
        (
            "gpt_oss",
            {"quant_method": "mxfp4"},
            "org/gpt-oss-20b-bnb-4bit",
            "served on the published base",
        ),
        ("gpt_oss", {"quant_method": "awq", "bits": 4}, "openai/gpt-oss-20b", "quantized copy (awq w4a16)"),
        ("deepseek_v3", {"quant_method": "fp8"}, "deepseek-ai/DeepSeek-V3", None),
        ("llama", {"quant_method": "fp8"}, "meta-llama/Llama-3.1-8B", "quantized copy (fp8)"),
    ],
)
def test_a_base_that_was_published_in_few_bits_is_nobodys_copy(
    kind: str,
    quantization: dict[str, object],
    named: str,
    says: str | None,
    plain: Path,
    trained: Path,
    tmp_path: Path,
) -> None:
    described = {"model_type": kind, "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(described))
    bits, published = quantized_as(tmp_path)
    base = read_base(
        plain, max_lora_rank=64, name=without_bits(named.rpartition("/")[2]).removesuffix("-bf16")
    )
    base = dataclasses.replace(base, source=None, quantized=bits, published_quantized=published)
    config, tensors = read(trained)
    (tmp_path / "adapter").mkdir()
    write(tmp_path / "adapter", {**config, "base_model_name_or_path": named}, tensors)
    warnings = [one for one in inspect(tmp_path / "adapter", base).warnings if "answers differ" in one]
    assert len(warnings) == (says is not None)
    assert says is None or says in warnings[0]


def test_a_dora_is_refused_on_a_quantized_base(plain: Path, tmp_path: Path) -> None:
    quantize(plain, "AWQ", tmp_path / "few")
    breed(Base(plain), "DoRA", Specimen({"use_dora": True}), tmp_path / "adapter")
    found = diagnose(tmp_path / "adapter", read_base(tmp_path / "few", max_lora_rank=64))
    assert isinstance(found.error, AdapterRejected)
    assert found.error.code == "dora_unsupported"

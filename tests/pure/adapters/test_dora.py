"""DoRA's scale, computed at the intake, is what PEFT computes at every pass; or the upload is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapters.errors import AdapterRejected
from adapters.inspection.admit import admit
from adapters.inspection.base_model import read_base
from adapters.inspection.dora import MAGNITUDE, NOTE, SCALE
from adapters.inspection.inspect import check_fit
from adapters.model import WEIGHTS_FILE, BaseModel
from tests.support.peft_adapters import K1, Config, Tensors, make_llama, read, train, write

M1 = f"base_model.model.{K1}{MAGNITUDE}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("base")
    make_llama().save_pretrained(folder, max_shard_size="60KB")
    return read_base(folder, max_lora_rank=16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = train(
        tmp_path_factory.mktemp("dora"), use_dora=True, use_rslora=True, rank_pattern={"k_proj": 2}
    )
    config, tensors = read(folder)
    for name, tensor in tensors.items():
        if name.endswith(MAGNITUDE):
            tensor *= torch.linspace(0.5, 1.5, len(tensor))
    return write(folder, config, tensors)


@pytest.mark.parametrize("apart", [True, False])
def test_the_scale_is_pefts(apart: bool, trained: Path, base: BaseModel, tmp_path: Path) -> None:
    upload = write(tmp_path / "upload", *read(trained))
    into = tmp_path / "into" if apart else upload
    into.mkdir(exist_ok=True)
    manifest = admit(upload, base, into=into, serving_dtype="float32")
    assert manifest.conversions == (NOTE,)
    before, stored = load_file(trained / WEIGHTS_FILE), load_file(into / WEIGHTS_FILE)
    assert all(torch.equal(stored[name], before[name]) for name in before)
    peft = PeftModel.from_pretrained(make_llama(), into).base_model.model
    for module in manifest.modules:
        layer = peft.get_submodule(module)
        dora = layer.lora_magnitude_vector["default"]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        norm = dora.get_weight_norm(layer.base_layer.weight, b @ a, layer.scaling["default"])
        expected = (dora.weight / norm).detach()
        assert torch.allclose(stored[f"base_model.model.{module}{SCALE}"], expected, rtol=1e-5)
    check_fit(into, base)
    assert admit(into, base, into=tmp_path).conversions == (NOTE,)  # what was downloaded is taken again
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == (into / WEIGHTS_FILE).read_bytes()


RENAMED: dict[str, Callable[[str], str]] = {
    "DDP": lambda name: f"module.{name}",
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "the adapter's name": lambda name: (
        f"{name}.default" if name.endswith(MAGNITUDE) else name.replace(".weight", ".default.weight")
    ),
    "the adapter's name, as a weight": lambda name: (
        f"{name}.default.weight" if name.endswith(MAGNITUDE) else name.replace(".weight", ".default.weight")
    ),
    "a bare backbone": lambda name: name.replace("base_model.model.model.", "base_model.model."),
}


@pytest.mark.parametrize("style", RENAMED)
def test_magnitudes_are_renamed_along(style: str, trained: Path, base: BaseModel, tmp_path: Path) -> None:
    config, tensors = read(trained)
    upload = write(tmp_path / "upload", config, {RENAMED[style](name): x for name, x in tensors.items()})
    plain, into = tmp_path / "plain", tmp_path / "into"
    plain.mkdir()
    into.mkdir()
    admit(trained, base, into=plain, serving_dtype="float32")
    manifest = admit(upload, base, into=into, serving_dtype="float32")
    assert manifest.conversions[-1] == NOTE
    assert len(manifest.conversions) == 2
    wanted, stored = load_file(plain / WEIGHTS_FILE), load_file(into / WEIGHTS_FILE)
    assert {name.removesuffix(".weight") for name in stored} == {n.removesuffix(".weight") for n in wanted}
    for name, tensor in stored.items():
        assert torch.equal(tensor, wanted.get(name, wanted.get(f"{name}.weight", tensor * torch.nan)))
    check_fit(into, base)


def test_what_is_fused_in_checkpoint_and_upload_is_cut_alike(base: BaseModel, tmp_path: Path) -> None:
    """As GLM-4 has gate and up: one weight, and in an adapter one lora_A, lora_B and vector of magnitudes."""
    apart = train(tmp_path / "apart", use_dora=True, target_modules=["gate_proj", "up_proj"])
    config, tensors = read(apart)
    fused: Tensors = {}
    for layer in ("0", "1"):
        stem = f"base_model.model.model.layers.{layer}.mlp"
        tensors[f"{stem}.up_proj.lora_A.weight"] = tensors[f"{stem}.gate_proj.lora_A.weight"].clone()
        fused[f"{stem}.gate_up_proj.lora_A.weight"] = tensors[f"{stem}.gate_proj.lora_A.weight"].clone()
        for end in (".lora_B.weight", MAGNITUDE):
            both = [tensors[f"{stem}.{part}{end}"] for part in ("gate_proj", "up_proj")]
            fused[f"{stem}.gate_up_proj{end}"] = torch.cat(both)
    weights = make_llama().state_dict()
    for layer in ("0", "1"):
        stem = f"model.layers.{layer}.mlp"
        both = [weights.pop(f"{stem}.{part}.weight") for part in ("gate_proj", "up_proj")]
        weights[f"{stem}.gate_up_proj.weight"] = torch.cat(both)
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    base = replace(base, fused={"gate_up_proj": ("gate_proj", "up_proj")})
    found = []
    for name, one, of in (
        ("apart", tensors, base),
        ("fused", fused, replace(base, source=str(tmp_path / "base"))),
    ):
        targets = ["gate_proj", "up_proj"] if name == "apart" else ["gate_up_proj"]
        into = tmp_path / f"into-{name}"
        into.mkdir()
        admit(write(tmp_path / f"up-{name}", {**config, "target_modules": targets}, one), of, into=into)
        found.append(load_file(into / WEIGHTS_FILE))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_two_magnitudes_of_one_layer_are_refused(trained: Path, base: BaseModel, tmp_path: Path) -> None:
    config, tensors = read(trained)
    tensors = {f"module.{name}": tensor for name, tensor in tensors.items()}
    tensors[M1] = tensors[f"module.{M1}"].clone()
    with pytest.raises(AdapterRejected, match="two magnitudes"):
        admit(write(tmp_path, config, tensors), base)


def test_a_stored_scale_is_for_one_base(trained: Path, base: BaseModel, tmp_path: Path) -> None:
    admit(trained, base, into=tmp_path)
    with pytest.raises(AdapterRejected, match="another base") as refused:
        check_fit(tmp_path, replace(base, fingerprint="0" * 64))
    assert refused.value.code == "dora_unsupported"
    with pytest.raises(AdapterRejected) as refused:
        check_fit(tmp_path, replace(base, dora=False))
    assert refused.value.code == "dora_unsupported"


def _without(_: Config, tensors: Tensors) -> None:
    del tensors[M1]


def _shorter(_: Config, tensors: Tensors) -> None:
    tensors[M1] = tensors[M1][:-1].clone()


def _huge(_: Config, tensors: Tensors) -> None:
    tensors[M1] *= 1000


def _nan(_: Config, tensors: Tensors) -> None:
    tensors[M1][3] = torch.nan


def _orphan(_: Config, tensors: Tensors) -> None:
    tensors[M1.replace("k_proj", "o_proj")] = torch.ones(64)


BAD = {
    "tensor_unpaired": (_without, "has no lora_magnitude_vector"),
    "shape_mismatch": (_shorter, "is needed"),
    "adapter_implausible": (_huge, "another base model"),
    "weights_not_finite": (_nan, "not finite"),
}


@pytest.mark.parametrize("code", [*BAD, "an orphan"])
def test_what_cannot_be_computed_is_refused(
    code: str, trained: Path, base: BaseModel, tmp_path: Path
) -> None:
    change: Callable[[Config, Tensors], None]
    change, says = BAD.get(code, (_orphan, "has no lora_A and lora_B"))
    config, tensors = read(trained)
    change(config, tensors)
    with pytest.raises(AdapterRejected, match=says) as refused:
        admit(write(tmp_path, config, tensors), base)
    assert refused.value.code == (code if code in BAD else "tensor_unpaired")
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("kind", ["of eight bits", "packed", "elsewhere"])
def test_a_quantized_base_is_refused(kind: str, trained: Path, base: BaseModel, tmp_path: Path) -> None:
    source = tmp_path / "base"
    make_llama().save_pretrained(source)
    weights = load_file(source / "model.safetensors")
    if kind == "of eight bits":
        weights[f"{K1}.weight"] = weights[f"{K1}.weight"].to(torch.float8_e4m3fn)
    else:
        weights[f"{K1}.weight_packed"] = weights.pop(f"{K1}.weight")
    save_file(weights, source / "model.safetensors")
    where = "acme/of-the-hub" if kind == "elsewhere" else str(source)
    with pytest.raises(AdapterRejected, match="quantized") as refused:
        admit(write(tmp_path / "upload", *read(trained)), replace(base, source=where))
    assert refused.value.code == "dora_unsupported"


def test_the_bases_fingerprint_is_in_the_file(trained: Path, base: BaseModel, tmp_path: Path) -> None:
    admit(trained, base, into=tmp_path)
    with safe_open(tmp_path / WEIGHTS_FILE, framework="pt") as file:
        assert file.metadata()["loraplex_dora_base"] == base.fingerprint

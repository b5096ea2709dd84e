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
from tests.pure.adapters.test_inspect import K1, Config, Tensors, make_llama, read, train, write

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


def _wrapped(_: Config, tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[f"module.{name}"] = tensors.pop(name)


BAD = {
    "tensor_unpaired": (_without, "has no lora_magnitude_vector"),
    "shape_mismatch": (_shorter, "is needed"),
    "adapter_implausible": (_huge, "another base model"),
    "weights_not_finite": (_nan, "not finite"),
    "dora_unsupported": (_wrapped, "as PEFT saves it"),
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

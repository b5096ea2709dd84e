"""A merged checkpoint answers as PEFT does, is made in bounded memory, and is there whole or not at all."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adapters.errors import AdapterRejected
from adapters.inspection.base_model import read_base
from adapters.model import CONFIG_FILE
from adapters.offline import merge as merging
from adapters.offline.merge import INDEX_FILE, Merge, MergeError, Probe
from server.cli import offline
from server.demo.base import CHECKOUT, cache_folder, prepare
from tests.pure.adapters.test_convert import PROMPT, STYLES, train_on_changed_base
from tests.support.peft_adapters import K1, make_llama, read, train, write

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {K1: 3}, "use_rslora": True},
    "half": {"dtype": torch.float16},
    "dora": {"use_dora": True, "target_modules": ["v_proj", "o_proj", "down_proj"]},
}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    make_llama().save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights in another form")
    (folder / "original").mkdir()
    return folder


def merge(base_dir: Path, adapter: Path, out: Path) -> Path:
    with Merge(base_dir, read_base(base_dir, max_lora_rank=999), adapter, out) as made:
        made.run()
        made.keep()
    return out


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(PROMPT).logits
    return found


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_merged_model_answers_as_peft_does(
    name: str, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_ROWS", 1000)
    adapter = train(tmp_path / "adapter", **ADAPTERS[name])
    out = merge(base_dir, adapter, tmp_path / "out")
    assert torch.allclose(logits(out), logits(base_dir, adapter), atol=1e-5)
    assert not torch.allclose(logits(out), logits(base_dir), atol=1e-2)
    assert {path.name for path in out.iterdir()} == {
        path.name for path in base_dir.iterdir() if path.is_file() and path.suffix != ".bin"
    }
    assert (out / INDEX_FILE).read_bytes() == (base_dir / INDEX_FILE).read_bytes()


def test_what_must_be_converted_is(base_dir: Path, tmp_path: Path) -> None:
    config, tensors = read(train(tmp_path / "adapter"))
    STYLES["the adapter's name"][0](config, tensors)
    adapter = write(tmp_path / "named", config, tensors)
    out = merge(base_dir, adapter, tmp_path / "out")
    assert torch.allclose(logits(out), logits(base_dir, tmp_path / "adapter"), atol=1e-5)
    trained = train_on_changed_base(tmp_path / "pissa", init_lora_weights="pissa")
    out = merge(base_dir, tmp_path / "pissa" / "trained", tmp_path / "out2")
    assert torch.allclose(logits(out), trained, atol=1e-4)


def test_only_what_the_adapter_changes_is_changed(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_llama().to(torch.bfloat16).save_pretrained(base)
    adapter = train(tmp_path / "adapter", target_modules=["k_proj"], layers_to_transform=[1])
    out = merge(base, adapter, tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{K1}.weight"}
    _, tensors = read(adapter)
    a, b = (tensors[f"base_model.model.{K1}.lora_{side}.weight"] for side in "AB")
    assert torch.equal(after[f"{K1}.weight"], (before[f"{K1}.weight"].float() + 2 * b @ a).bfloat16())


def nothing_left(folder: Path) -> None:
    assert [path.name for path in folder.iterdir() if path.name.startswith(".") or path.name == "out"] == []


def test_nothing_is_overwritten_and_nothing_half_is_left(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = train(tmp_path / "adapter")
    there = tmp_path / "there"
    there.mkdir()
    with pytest.raises(FileExistsError, match="already"):
        merge(base_dir, adapter, there)
    base = read_base(base_dir, max_lora_rank=999)
    with Merge(base_dir, base, adapter, tmp_path / "out") as made:
        made.run()
    nothing_left(tmp_path)
    with Merge(base_dir, base, adapter, tmp_path / "out") as made:
        made.run()
        (tmp_path / "out").mkdir()
        with pytest.raises(FileExistsError, match="meantime"):
            made.keep()
    (tmp_path / "out").rmdir()
    nothing_left(tmp_path)
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        merge(base_dir, adapter, tmp_path / "out")
    nothing_left(tmp_path)


def test_what_cannot_be_merged_is_refused(base_dir: Path, tmp_path: Path) -> None:
    adapter = train(tmp_path / "adapter")
    config, tensors = read(adapter)
    dora = write(tmp_path / "dora", config | {"use_dora": True}, tensors)
    with pytest.raises(AdapterRejected):
        merge(base_dir, dora, tmp_path / "out")
    for name, change in {
        "quantized": lambda w: w.to(torch.int8),
        "of another shape": lambda w: w[:, :-1].contiguous(),
    }.items():
        odd = tmp_path / name
        make_llama().save_pretrained(odd)
        weights = load_file(odd / "model.safetensors")
        weights[f"{K1}.weight"] = change(weights[f"{K1}.weight"])
        save_file(weights, odd / "model.safetensors")
        with pytest.raises(MergeError, match=f"{K1}.*original checkpoint"):
            merge(odd, adapter, tmp_path / "out")
        del weights[f"{K1}.weight"]
        save_file(weights, odd / "model.safetensors")
        with pytest.raises(MergeError, match=f"no tensor {K1}"):
            merge(odd, adapter, tmp_path / "out")
        (odd / "model.safetensors").unlink()
        with pytest.raises(MergeError, match="neither"):
            merge(odd, adapter, tmp_path / "out")
    half = tmp_path / "half"
    make_llama().half().save_pretrained(half)
    tensors = {name: tensor * 3000 for name, tensor in tensors.items()}
    with pytest.raises(MergeError, match="too large for float16"):
        merge(half, write(tmp_path / "large", config, tensors), tmp_path / "out")
    nothing_left(tmp_path)


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from adapters.offline import merge
from adapters.inspection import base_model as shapes
from server.cli import offline
def data_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))
base, adapter, out, room = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
described = shapes.read_base(base, max_lora_rank=64)
limit = data_bytes() + room
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
with merge.Merge(base, described, adapter, out) as made:
    print(made.run())
    made.keep()
try:
    torch.zeros(room, dtype=torch.uint8)
except RuntimeError:
    print("limited")
"""


def test_a_sharded_base_larger_than_the_memory_that_may_be_used(tmp_path: Path) -> None:
    room = 120 << 20
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    torch.manual_seed(0)
    base = tmp_path / "base"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base, max_shard_size="40MB")
    shards = sorted(base.glob("*.safetensors"))
    assert len(shards) >= 5
    assert sum(path.stat().st_size for path in shards) > 1.5 * room
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
    shapes = read_base(base, max_lora_rank=64).modules
    tensors = {}
    for module, shape in shapes.items():
        if module.endswith(tuple(targets)):
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(16, shape.in_features)
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(shape.out_features, 16)
    fields = {"peft_type": "LORA", "r": 16, "lora_alpha": 1, "target_modules": targets}
    adapter = write(tmp_path / "adapter", fields, tensors)
    command = [sys.executable, "-c", LIMITED, base, adapter, tmp_path / "out", str(room)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=CHECKOUT)
    assert done.stdout.split() == ["24", "limited"], done.stderr[-2000:]
    module = "model.layers.5.mlp.down_proj"
    name = json.loads((base / INDEX_FILE).read_text())["weight_map"][f"{module}.weight"]
    with safe_open(base / name, "pt") as old, safe_open(tmp_path / "out" / name, "pt") as new:
        before, after = (file.get_tensor(f"{module}.weight") for file in (old, new))
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
    assert torch.allclose(after.float(), before.float() + b @ a / 16, rtol=1e-2, atol=1e-3)


def test_the_demos_base_is_merged_and_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = prepare(cache_folder()), CHECKOUT / "config" / "demo" / "corvus"
    monkeypatch.setattr(offline, "PROMPTS", offline.PROMPTS[:1])
    out = tmp_path / "out"
    assert offline.merge(base, adapter, out, verify=True, tolerance=0.1) == 0
    shown = capsys.readouterr().out
    assert "120 weights changed" in shown
    assert "written" in shown
    assert {"tokenizer.json", "chat_template.jinja", CONFIG_FILE.replace("adapter_", "")} <= {
        path.name for path in out.iterdir()
    }


def test_what_differs_is_not_kept(
    base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = train(tmp_path / "adapter")
    for difference, code in ((0.2, 1), (math.nan, 1), (0.05, 0), (0.05, 2)):
        monkeypatch.setattr(Merge, "verify", lambda *_, by=difference: [Probe("p", 1.0, 1.0, by)])
        assert offline.merge(base_dir, adapter, tmp_path / "out", verify=True, tolerance=0.1) == code
        assert (tmp_path / "out").exists() == (code != 1)
        assert ("not kept" in capsys.readouterr().out) == (code == 1)
    monkeypatch.undo()
    assert offline.merge(base_dir, adapter, tmp_path / "out2", verify=True, tolerance=0.1) == 2
    assert offline.merge(base_dir, adapter, tmp_path / "out2", verify=False, tolerance=0.1) == 0

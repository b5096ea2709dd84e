"""``loraplex doctor``: the server's inspection without a server, and the shapes that it needs for it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from adapters.inspection.base_model import dtype_of, fingerprint, module_shapes, read_base
from adapters.inspection.inspect import inspect
from adapters.model import BaseModel, ModuleShape
from adapters.offline.doctor import diagnose
from server.cli import offline
from tests.service.cli.test_commands import run as run_beside
from tests.support.fakes import FakeEngine
from tests.support.peft_adapters import base, good, make_llama, read, write
from tests.support.spoiled import rename
from tests.support.tiny import fake_site

__all__ = ["base", "good"]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny-llama"
    make_llama().save_pretrained(folder)
    return folder


def test_the_shapes_are_those_of_the_model(base_dir: Path, base: BaseModel) -> None:
    assert module_shapes(base_dir) == dict(sorted(base.modules.items()))
    assert read_base(base_dir, max_lora_rank=16).fused == base.fused


def test_a_qwen_without_weights(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    Qwen3Config(vocab_size=64, num_attention_heads=4, num_key_value_heads=2, **sizes).save_pretrained(
        tmp_path
    )
    shapes = module_shapes(tmp_path)
    assert len(shapes) == 14
    assert shapes["model.layers.1.self_attn.q_proj"] == ModuleShape(32, 64)
    assert shapes["model.layers.1.mlp.down_proj"] == ModuleShape(48, 32)
    assert fingerprint(tmp_path) is None


def test_a_fingerprint_is_of_the_weights_and_not_of_their_type_or_files(tmp_path: Path) -> None:
    model = make_llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    model.float().save_pretrained(tmp_path / "float32")
    found = fingerprint(tmp_path / "a")
    assert found is not None
    assert fingerprint(tmp_path / "sharded") == fingerprint(tmp_path / "float32") == found
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "a"))
    other.save_pretrained(tmp_path / "other")
    assert fingerprint(tmp_path / "other") != found


@pytest.mark.parametrize(
    ("dtype", "served"), [("float32", "bfloat16"), ("float16", "float16"), ("bfloat16", "bfloat16")]
)
def test_the_type_is_what_vllm_chooses(dtype: str, served: str, tmp_path: Path) -> None:
    make_llama().to(getattr(torch, dtype)).save_pretrained(tmp_path)
    assert dtype_of(tmp_path) == served


def test_a_diagnosis_is_the_servers_and_leaves_the_folder_alone(
    good: Path, base: BaseModel, tmp_path: Path
) -> None:
    assert diagnose(good, base).manifest == inspect(good, base)
    config, tensors = read(good)
    rename(".weight", ".default.weight")(config, tensors)
    folder = write(tmp_path, config, tensors)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    found = diagnose(folder, base).manifest
    assert found is not None
    assert (found.modules, len(found.conversions)) == (inspect(good, base).modules, 1)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    refused = diagnose(folder, dataclasses.replace(base, max_lora_rank=2))
    assert refused.manifest is None
    assert refused.as_json()["error"]["code"] == "rank_too_large"


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", "doctor", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_line(good: Path, base_dir: Path) -> None:
    done = run(good, "--base", base_dir, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"]
    assert report["base"] == {"name": "tiny-llama", "fingerprint": fingerprint(base_dir), "modules": 14}
    assert report["report"]["coverage"][0]["layers"] == "0-1"


def test_the_exit_codes(good: Path, base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def doctor(adapter: Path, base: Path = base_dir, rank: int = 16, dtype: str | None = None) -> int:
        return offline.doctor(adapter, base, max_rank=rank, dtype=dtype, as_json=False)

    assert doctor(good) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("self_attn.q_proj", "0-1", "accepted", "tiny-llama"))
    assert doctor(good, rank=2) == 1
    assert "rank_too_large" in capsys.readouterr().out
    assert doctor(good.parent / "nowhere") == 2
    assert doctor(good, base=good.parent) == 2
    assert doctor(good, dtype="fp8") == 2
    assert "serving_dtype" in capsys.readouterr().err


@pytest.mark.parametrize("whose", ["customer", "operator"])
async def test_a_running_server_says_what_it_takes(
    good: Path, base_dir: Path, tmp_path: Path, whose: str
) -> None:
    """An operator's key and a customer's get the same verdict of the same server."""
    small = read_base(base_dir, max_lora_rank=2)
    async with fake_site(tmp_path / "data", FakeEngine(small)) as site:
        key = {} if whose == "operator" else {"LORAPLEX_KEY": await site.tenant("acme")}
        words = ("doctor", str(good), "--server", "--base")
        done = await run_beside(site, *words, str(base_dir), "--json", **key)
        assert (done.exit_code, json.loads(done.stdout)["error"]["code"]) == (1, "rank_too_large")
        assert ("may not upload" in done.stderr) == (whose == "customer"), "its key is one for inference"
        torch.manual_seed(1)
        other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base_dir))
        other.save_pretrained(tmp_path / "other")
        done = await run_beside(site, *words, str(tmp_path / "other"), **key)
        assert (done.exit_code, "is not the base that the server has" in done.stderr) == (2, True)
        if whose == "customer":
            done = await run_beside(site, "doctor", str(good), "--server", **key)
            assert (done.exit_code, "is not visible with a customer's key" in done.stderr) == (2, True)

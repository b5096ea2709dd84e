"""Folders as trainers leave them: the adapter in them is found, or the refusal names the trainer."""

from __future__ import annotations

import io
import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapters.errors import AdapterRejected
from adapters.inspection.admit import admit
from adapters.inspection.layouts import trainer_of
from adapters.inspection.peft_config import parse_config
from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from adapters.store.archives import read
from tests.service.store.test_archives import entry, tar
from tests.support import tiny
from tests.support.trainer import read as read_adapter

PAGE = Path(__file__).parents[3] / "docs" / "adapters.md"
ADAPTER = {CONFIG_FILE: b"{}", WEIGHTS_FILE: b"weights"}
TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
STATE = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"]
CHECKPOINT = [f"checkpoint-500/{name}" for name in (*ADAPTER, *TOKENIZER, *STATE)]
# Trainer -> what it leaves beside the adapter, or instead of it.
TAKEN = {
    "TRL": ["README.md", "training_args.bin", *TOKENIZER, *CHECKPOINT],
    "Axolotl": ["README.md", "config.json", "debug.log", *TOKENIZER, *CHECKPOINT],
    "Axolotl, pickled, too": ["adapter_model.bin", "config.json", *TOKENIZER],
    "Unsloth": [*TOKENIZER, "vocab.json", "merges.txt", "added_tokens.json"],
    "LLaMA-Factory": [
        "all_results.json", "train_results.json", "trainer_log.jsonl", "trainer_state.json",
        "training_loss.png", "training_args.bin", "README.md", *TOKENIZER, *CHECKPOINT,
    ],
    "MLX-LM beside it": ["adapters.safetensors", "0000100_adapters.safetensors"],
}  # fmt: skip
REFUSED = {
    "MLX-LM": [CONFIG_FILE, "adapters.safetensors", "0000100_adapters.safetensors"],
    "NeMo": ["./model_config.yaml", "./model_weights.ckpt"],
    "diffusers": ["pytorch_lora_weights.safetensors"],
    "mistral-finetune": ["checkpoints/checkpoint_000100/consolidated/lora.safetensors", "params.json"],
    "llama.cpp": ["adapter-f16.gguf"],
}


def found(*names: str) -> dict[str, bytes]:
    got: dict[str, bytes] = {}
    archive = tar(*[entry(f"run/{name.removeprefix('./')}", ADAPTER.get(name, b"other")) for name in names])
    for name, piece in read(io.BytesIO(archive), max_bytes=1 << 20):
        got[name] = got.get(name, b"") + piece
    return got


@pytest.mark.parametrize("trainer", TAKEN)
def test_the_adapter_in_a_trainers_folder_is_found(trainer: str) -> None:
    got = found(*TAKEN[trainer], *ADAPTER)
    assert ADAPTER.items() <= got.items()
    assert got.keys() - ADAPTER.keys() <= {*TOKENIZER, "added_tokens.json", "adapter_model.bin"}
    assert got.get("adapter_model.bin", b"") == b"", "a pickle is named, and not read"


@pytest.mark.parametrize("trainer", REFUSED)
def test_another_form_is_refused_by_its_trainers_name(trainer: str) -> None:
    with pytest.raises(AdapterRejected, match=f"as {trainer} saves it") as refused:
        found(*REFUSED[trainer])
    assert refused.value.code == "layout_foreign"
    assert {trainer_of(Path(name).name) for name in REFUSED[trainer]} - {None} == {trainer}


def test_mlxs_config_is_known_by_its_fields() -> None:
    config = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 8, "scale": 20.0}}
    with pytest.raises(AdapterRejected, match="MLX-LM") as refused:
        parse_config(config, tiny.base())
    assert refused.value.code == "layout_foreign"


def test_the_page_makes_pefts_form_of_mlxs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX-LM: y = Wx + scale * (x @ lora_a) @ lora_b."""
    folder = tiny.adapter(1)
    config, tensors = read_adapter(folder)
    scale = 2.5
    theirs = {
        name.removeprefix("base_model.model.")
        .replace("lora_A.weight", "lora_a")
        .replace("lora_B.weight", "lora_b"): tensor.T.contiguous()
        for name, tensor in tensors.items()
    }
    save_file(theirs, tmp_path / "adapters.safetensors")
    lora = {"rank": config["r"], "scale": scale, "dropout": 0.0}
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": lora}))
    code = PAGE.read_text().split("<!-- mlx")[1].split("```python\n")[1].split("```")[0]
    (tmp_path / "convert.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("convert.py")
    (tmp_path / "made").mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / name).rename(tmp_path / "made" / name)
    manifest = admit(tmp_path / "made", tiny.base())
    made, converted = read_adapter(tmp_path / "made")
    assert manifest.conversions == ()
    assert len(manifest.modules) == len(tensors) // 2
    assert made["lora_alpha"] / made["r"] == scale
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in tensors.items())

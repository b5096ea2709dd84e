"""The real engine set up anew, on what was uploaded for the one before: served as PEFT does, or refused.

On the whole of the demo's base, with all its layers.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from server.app import create_app
from tests.engine.reference import Reference, Spec
from tests.service.http.test_api import error
from tests.support.site import Site, engine_settings, serving

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

QUESTION = "What is the capital of France?"
TOLERANCE = 1e-3


def made(base: Path, data: Path, **args: Any) -> Any:
    limits = {"adapter_gpu_memory": "200MiB", "adapter_host_memory": "300MiB", "max_lora_rank": 16}
    engine_args = {"dtype": "float32", "max_num_seqs": 4} | args
    return create_app(engine_settings(base, data, max_model_len=256, engine_args=engine_args, **limits))


async def agrees(site: Site, key: str, model: str, reference: Reference, folder: Path) -> None:
    fields = {"max_tokens": 6, "temperature": 0, "logprobs": True, "return_token_ids": True}
    answer = await site.chat(key, QUESTION, model=model, **fields)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    said = choice["logprobs"]["content"]
    truth = reference.score(folder, reference.chat_ids(QUESTION), choice["token_ids"])
    differences = [abs(a["logprob"] - b) for a, b in zip(said, truth.log_probs, strict=True)]
    assert max(differences) < TOLERANCE


async def test_a_narrower_engine_and_another_base_refuse_what_they_cannot_serve(
    whole_base_dir: Path, whole_reference: Reference, tmp_path: Path
) -> None:
    base_dir, reference, data = whole_base_dir, whole_reference, tmp_path / "data"
    whole = reference.make(Spec(seed=1, rank=8, targets=("q_proj", "up_proj")), tmp_path / "whole")
    narrow = reference.make(Spec(seed=2, rank=8, targets=("q_proj", "v_proj")), tmp_path / "narrow")
    async with serving(made(base_dir, data)) as site:
        key = await site.tenant("acme", {"whole": whole, "narrow": narrow})
        await agrees(site, key, "whole", reference, whole)
    async with serving(made(base_dir, data, lora_target_modules=["qkv_proj"])) as site:
        error(await site.chat(key, QUESTION, model="whole"), 409, "adapter_unfit")
        error(await site.chat(key, QUESTION, model="whole@1"), 409, "adapter_unfit")
        await agrees(site, key, "narrow", reference, narrow)
    async with serving(made(other_base(base_dir, tmp_path / "other" / base_dir.name), data)) as site:
        for model in ("whole", "narrow"):
            refused = error(await site.chat(key, QUESTION, model=model), 409, "adapter_unfit")
            assert "another base model" in refused["message"]
        assert (await site.chat(key, QUESTION, model=base_dir.name)).status_code == 200


def other_base(base: Path, folder: Path) -> Path:
    """The same shapes with other weights, as a base that was trained further."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, path, {"format": "pt"})
    return folder

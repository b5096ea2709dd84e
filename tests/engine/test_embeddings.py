"""Embeddings of a tiny Llama by the real engine, an engine of their own, against transformers and PEFT."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from server.app import create_app
from server.engine.arguments import slots_of
from tests.engine.reference import ATTENTION, MLP
from tests.support.embedding_suite import SAME, EmbeddingSuite, ask, far, vectors
from tests.support.overflow import make_overflowing
from tests.support.site import Site, engine_settings, serving
from tests.support.trainer import Base, make_base

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

TOLERANCE = 1e-3
PROMPTS = [[5, 17, 3, 88, 41, 200, 9], [1, 2, 3], list(range(60)), [7]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_base("llama", tmp_path_factory.mktemp("llama") / "base")


def make(model: Any, seed: int, folder: Path, task: str) -> Path:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=[*ATTENTION, *MLP], task_type=task)
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The second was trained on the bare backbone, as embedding models are: no ``model.`` in its names."""
    folder = tmp_path_factory.mktemp("adapters")
    backbone = AutoModel.from_pretrained(base.folder, dtype=torch.float32)
    return [
        make(base.fresh(), 1, folder / "a", "CAUSAL_LM"),
        make(backbone, 2, folder / "b", "FEATURE_EXTRACTION"),
    ]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(base: Base, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    settings = engine_settings(
        base.folder,
        tmp_path_factory.mktemp("data"),
        adapter_gpu_memory="4MiB",
        adapter_host_memory="8MiB",
        max_lora_rank=8,
        max_model_len=128,
        engine_args={
            "runner": "pooling",
            "convert": "embed",
            "dtype": "float32",
            "max_num_seqs": 16,
            "tokenizer": str(base.folder / "tokenizer"),
        },
    )
    async with serving(create_app(settings)) as site:
        yield site
        assert (await site.services.engine.report()).in_step_loads == 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def key(site: Site, adapters: list[Path]) -> str:
    return await site.tenant("acme", {"a": adapters[0], "b": adapters[1]})


class TestEmbeddings(EmbeddingSuite):
    pass


def truth(model: Any, ids: list[int]) -> list[float]:
    """The last token's hidden state, at length 1."""
    with torch.inference_mode():
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
    found: list[float] = torch.nn.functional.normalize(hidden, dim=-1).tolist()
    return found


async def test_they_are_what_transformers_and_peft_compute(
    site: Site, key: str, base: Base, adapters: list[Path]
) -> None:
    """Two customers' adapters and the base, in the engine together."""
    other = await site.tenant("globex", {"b": adapters[1]})
    asked = {(key, "a"): adapters[0], (other, "b"): adapters[1], (key, site.services.engine.base.name): None}
    found = await asyncio.gather(
        *(vectors(site, who, [prompt], model) for (who, model), prompt in itertools.product(asked, PROMPTS))
    )
    worst = 0.0
    for (folder, prompt), (vector,) in zip(itertools.product(asked.values(), PROMPTS), found, strict=True):
        backbone = folder is adapters[1]
        model = (
            AutoModel.from_pretrained(base.folder, dtype=torch.float32).eval() if backbone else base.fresh()
        )
        expected = truth(model if folder is None else PeftModel.from_pretrained(model, folder).eval(), prompt)
        worst = max(worst, far(vector, expected))
        assert sum(x * y for x, y in zip(vector, expected, strict=True)) > 1 - TOLERANCE
    print("largest difference from PEFT:", worst)
    assert worst < TOLERANCE


async def test_one_that_makes_nan_is_quarantined_and_nobody_elses_changes(
    site: Site, key: str, base: Base, tmp_path: Path
) -> None:
    token = await asyncio.to_thread(make_overflowing, base.folder, tmp_path / "bad")
    its = await site.tenant("overflowing")
    files = {name: (tmp_path / "bad" / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    versions = "/admin/v1/tenants/overflowing/adapters/bad/versions"
    anyhow = {"allow_implausible": True, "allow_no_effect": True}
    made = await site.admin.post(versions, files=files, params=anyhow)
    assert made.status_code == 201, made.text

    async def everybody() -> list[list[list[float]]]:
        models = ("a", "b", site.services.engine.base.name)
        return await asyncio.gather(*(vectors(site, key, PROMPTS, model) for model in models))

    def same(one: list[list[list[float]]], other: list[list[list[float]]]) -> bool:
        pairs = zip(itertools.chain(*one), itertools.chain(*other), strict=True)
        return all(far(*pair) < SAME for pair in pairs)

    wanted = await everybody()
    loud = [[*range(1, 8 + 9 * i), token, 5, 9] for i in range(10)]  # of as many blocks as others' prompts
    beside = asyncio.gather(*(everybody() for _ in range(6)))
    failed = await asyncio.gather(*(ask(site, its, [prompt, [3, 4]], "bad") for prompt in loud))
    codes = {answer.json()["error"]["code"] for answer in failed}
    assert "adapter_not_finite" in codes, [answer.text[:300] for answer in failed]
    assert codes <= {"adapter_not_finite", "adapter_quarantined"}
    assert all(same(one, wanted) for one in await beside)
    assert same(await everybody(), wanted), "in blocks that it had written"
    refused = await ask(site, its, [3, 4], "bad")
    assert refused.json()["error"]["code"] == "adapter_quarantined"
    (shown,) = (await site.admin.get(versions.removesuffix("/versions"))).json()["versions"]
    assert shown["quarantine"], shown


async def test_a_slot_costs_what_was_computed(site: Site) -> None:
    slots = await asyncio.to_thread(slots_of, site.services.settings)
    assert slots.slot_bytes == site.services.engine.capacity.slot_bytes

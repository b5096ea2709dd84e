"""``/v1/classify`` over HTTP on a fake engine: heads of adapters' own, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.model import CONFIG_FILE, WEIGHTS_FILE, Head
from tests.service.http.test_api import error
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.fleet import fleet
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site
from tests.support.trainer import read, write

MOST, HIDDEN = 8, 16
CLASSIFIER = replace(tiny.base(), pooling=True, head=Head("score", HIDDEN, 3, MOST))


def with_head(folder: Path, into: Path, labels: int = 5, **changes: Any) -> Path:
    """The adapter in ``folder`` with a head of its own, as PEFT saves it for SEQ_CLS."""
    config, tensors = read(folder)
    into.mkdir(parents=True)
    weight = torch.randn(labels, HIDDEN, generator=torch.Generator().manual_seed(labels))
    tensors["base_model.model.score.weight"] = weight
    fields = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"], **changes}
    write(into, config | fields, tensors)
    return into


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path, FakeEngine(CLASSIFIER, times=Times(step=0.001))) as site:
        yield site


@pytest.fixture
async def key(site: Site, tmp_path: Path) -> str:
    adapters = {"five": with_head(tiny.adapter(1), tmp_path / "five"), "none": tiny.adapter(2)}
    return await site.tenant("acme", adapters)


async def ask(site: Site, key: str, model: str, given: Any = "why", **more: Any) -> Any:
    body = {"model": model, "input": given, **more}
    return await site.http.post("/v1/classify", json=body, headers=bearer(key))


async def test_each_adapter_has_as_many_labels_as_it_was_trained_with(site: Site, key: str) -> None:
    for model, labels in (("five", 5), ("none", 3), (site.services.engine.base.name, 3)):
        answer = (await ask(site, key, model, ["why", "not"])).json()
        assert [one["num_classes"] for one in answer["data"]] == [labels] * 2, model
        assert [len(one["probs"]) for one in answer["data"]] == [labels] * 2
        assert [one["index"] for one in answer["data"]] == [0, 1]
        assert all(sum(one["probs"]) == pytest.approx(1) for one in answer["data"])
        assert answer["model"] == model
        assert answer["usage"]["prompt_tokens"] > 0
    raw = (await ask(site, key, "five", use_activation=False)).json()["data"][0]["probs"]
    assert sum(raw) != pytest.approx(1)


async def test_the_report_says_how_many(site: Site, key: str) -> None:
    listed = (await site.admin.get("/admin/v1/tenants/acme/adapters/five")).json()
    (version,) = listed["versions"]
    assert version["report"]["labels"] == 5
    assert version["report"]["warnings"] == []


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"labels": MOST + 1}, "it has 9 labels, and 1 to 8 are served"),
        ({"modules_to_save": None}, "the config has none"),
    ],
)
async def test_a_head_that_would_be_served_otherwise_is_refused(
    site: Site, key: str, tmp_path: Path, change: dict[str, Any], wrong: str
) -> None:
    refused = await site.upload("acme", "wrong", with_head(tiny.adapter(1), tmp_path / "wrong", **change))
    message = error(refused, 422, "head_mismatch", WEIGHTS_FILE)["message"]
    assert wrong in message
    assert "max_lora_cls_labels" in message


async def test_a_head_that_is_not_there_or_is_not_a_number_is_refused(
    site: Site, key: str, tmp_path: Path
) -> None:
    folder = with_head(tiny.adapter(1), tmp_path / "lost")
    tensors = load_file(folder / WEIGHTS_FILE)
    lost = {name: tensor for name, tensor in tensors.items() if "score" not in name}
    save_file(lost, folder / WEIGHTS_FILE)
    refused = error(await site.upload("acme", "wrong", folder), 422, "head_mismatch", WEIGHTS_FILE)
    assert "the weights have none" in refused["message"]
    save_file(tensors | {"base_model.model.score.weight": torch.full((2, 7), 0.1)}, folder / WEIGHTS_FILE)
    error(await site.upload("acme", "wrong", folder), 422, "head_mismatch", WEIGHTS_FILE)
    nan = torch.full((2, HIDDEN), torch.nan)
    save_file(tensors | {"base_model.model.score.weight": nan}, folder / WEIGHTS_FILE)
    error(await site.upload("acme", "wrong", folder), 422, "weights_not_finite", WEIGHTS_FILE)


async def test_a_head_beside_names_that_are_rewritten(site: Site, key: str, tmp_path: Path) -> None:
    config, tensors = read(with_head(tiny.adapter(1), tmp_path / "made"))
    folder = tmp_path / "ddp"
    folder.mkdir()
    named = {n if "score" in n else n.replace(".weight", ".default.weight"): t for n, t in tensors.items()}
    write(folder, config, named)
    taken = await site.upload("acme", "ddp", folder)
    assert taken.status_code == 201, taken.text
    assert taken.json()["report"]["labels"] == 5
    assert taken.json()["report"]["conversions"]
    assert len((await ask(site, key, "ddp")).json()["data"][0]["probs"]) == 5


async def test_what_other_bases_do_not_do(site: Site, key: str, tmp_path: Path) -> None:
    chat = await site.chat(key, "Hi", model="five")
    assert "/v1/classify" in error(chat, 400, "not_supported_by_base")["message"]
    async with fake_site(tmp_path / "other") as text:
        theirs = await text.tenant("acme", {"a": tiny.adapter(1)})
        refused = error(await ask(text, theirs, "a"), 400, "not_supported_by_base")
        assert "no labels" in refused["message"]
        folder = with_head(tiny.adapter(1), tmp_path / "head")
        error(await text.upload("acme", "b", folder), 422, "modules_to_save_unsupported", CONFIG_FILE)


async def test_a_gateway_knows_that_its_replicas_classify(tmp_path: Path) -> None:
    async with fleet(tmp_path, replicas=1, base=CLASSIFIER) as made:
        adapters = {"five": with_head(tiny.adapter(1), tmp_path / "five")}
        key = await made.gateway.tenant("acme", adapters)
        answer = (await ask(made.gateway, key, "five", ["why", "not"])).json()
        assert [len(one["probs"]) for one in answer["data"]] == [5, 5]
        refused = error(await made.gateway.chat(key, "Hi", model="five"), 400, "not_supported_by_base")
        assert "/v1/classify" in refused["message"]

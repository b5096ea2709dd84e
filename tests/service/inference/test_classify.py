"""``/v1/classify`` over HTTP on a fake engine: heads of adapters' own, and what is refused."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi.responses import JSONResponse
from safetensors.torch import load_file, save_file

from adapters.model import CONFIG_FILE, WEIGHTS_FILE, Head
from server.engine.errors import request_errors
from server.errors import Internal
from server.inference.dialects.base import Dialect
from server.inference.dialects.classify import Classify
from server.inference.dialects.scoring import PAIRS as PAIRS_BY_HEAD
from tests.service.http.test_api import engine_of, error
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


PAIRS = {"query": "why", "documents": ["the sky is blue", "why", {"text": "not"}]}


async def score(site: Site, key: str, model: str, url: str = "/v1/rerank", **body: Any) -> Any:
    return await site.http.post(url, json={"model": model, **(body or PAIRS)}, headers=bearer(key))


@pytest.fixture
async def scorers(site: Site, tmp_path: Path) -> str:
    """A customer with an adapter whose head has one label, on a base whose head has three."""
    adapters = {"one": with_head(tiny.adapter(1), tmp_path / "one", labels=1), "none": tiny.adapter(2)}
    return await site.tenant("zeta", adapters)


async def test_a_head_of_one_label_scores_two_texts_at_once(site: Site, scorers: str) -> None:
    ranked = await score(site, scorers, "one")
    assert ranked.status_code == 200, ranked.text
    results = ranked.json()["results"]
    assert sorted(one["index"] for one in results) == [0, 1, 2]
    scores = {one["index"]: one["relevance_score"] for one in results}
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert [one["document"] for one in results] == [
        {"text": ["the sky is blue", "why", "not"][one["index"]]} for one in results
    ]
    texts = {"text_1": "why", "text_2": ["the sky is blue", "why", "not"]}
    told = (await score(site, scorers, "one", "/v1/score", **texts)).json()
    assert [one["score"] for one in told["data"]] == [scores[i] for i in range(3)]
    assert (told["object"], told["model"]) == ("list", "one")
    # Two words and more for each pair, the query in all of them.
    assert told["usage"] == ranked.json()["usage"] == {"prompt_tokens": 12, "total_tokens": 12}
    raw = (await score(site, scorers, "one@1", "/v1/score", **texts, use_activation=False)).json()
    assert all(0 < one["score"] < 1 for one in told["data"])
    assert [one["score"] for one in raw["data"]] != [one["score"] for one in told["data"]]
    pairs = {"queries": ["why", "not"], "documents": ["why", "not"]}
    by_pair = (await score(site, scorers, "one", "/v1/score", **pairs)).json()
    assert by_pair["data"][0]["score"] == told["data"][1]["score"]
    rows = (await site.admin.get("/admin/v1/requests?limit=9&tenant=zeta")).json()["data"]
    assert {row["endpoint"] for row in rows} == {"rerank", "score"}
    assert {row["outcome"] for row in rows} == {"completed"}


async def test_a_head_of_more_labels_scores_nothing(site: Site, scorers: str, key: str) -> None:
    """It is said before the engine is asked: the fake would take down what it is asked wrongly."""
    cases = [(scorers, "none", 3), (scorers, site.services.engine.base.name, 3), (key, "five", 5)]
    for of, model, labels in cases:
        refused = error(await score(site, of, model), 400, "not_supported_by_base", "model")
        assert f"the head of {model} has {labels}; call /v1/classify" in refused["message"]


async def test_a_base_with_one_label_scores_for_adapters_without_a_head(tmp_path: Path) -> None:
    one = replace(CLASSIFIER, head=Head("score", HIDDEN, 1, MOST))
    async with fake_site(tmp_path, FakeEngine(one, times=Times(step=0.001))) as site:
        key = await site.tenant("acme", {"none": tiny.adapter(2)})
        for model in ("none", site.services.engine.base.name):
            assert (await score(site, key, model)).status_code == 200, model


async def test_which_pair_is_too_long(site: Site, scorers: str) -> None:
    long = "why " * 2000
    body = {"query": "why", "documents": ["why", long]}
    error(await score(site, scorers, "one", **body), 400, "context_length_exceeded", "documents.1")
    wrong = {"query": "why", "documents": ["why"], "use_activation": "no"}
    error(await score(site, scorers, "one", **wrong), 400, "invalid_request", "use_activation")


async def test_many_pairs_leave_places_to_others_and_limits_count_all(site: Site, tmp_path: Path) -> None:
    engine = engine_of(site)
    one = with_head(tiny.adapter(1), tmp_path / "many", labels=1)
    key = await site.tenant("many", {"one": one}, limits={"tokens_per_minute": 1000})
    engine.most_running = 0
    body = {"query": "why", "documents": ["not"] * 240}
    answer = await score(site, key, "one", **body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] == 720
    assert engine.most_running == engine.max_running // 4
    # Nearly the whole limit again, which it takes most of a minute to win back.
    error(await score(site, key, "one", **body), 429, "rate_limit_exceeded")


@pytest.mark.parametrize("dialect", [Classify(), PAIRS_BY_HEAD], ids=lambda dialect: dialect.name)
async def test_an_answer_that_is_no_number_is_our_fault(dialect: Dialect) -> None:
    """vLLM makes JSON of it first, whose ValueError would be told as the client's mistake."""

    async def answered(_: Any) -> JSONResponse:
        return JSONResponse({"data": [{"probs": [math.nan], "score": math.nan}]})

    serving = SimpleNamespace(serving_classification=answered, serving_scores=answered)
    with pytest.raises(Internal, match="not a number"), request_errors():
        await dialect.call(serving, None)


async def test_heads_where_workers_or_adapters_share(tmp_path: Path) -> None:
    """No head of an adapter's own is served there: the refusal says so, and others answer by the base's."""
    shared = replace(CLASSIFIER, head=Head("score", HIDDEN, 3, 0))
    async with fake_site(tmp_path, FakeEngine(shared, times=Times(step=0.001))) as site:
        key = await site.tenant("acme", {"none": tiny.adapter(2)})
        assert (await ask(site, key, "none")).json()["data"][0]["num_classes"] == 3
        own = await site.upload("acme", "own", with_head(tiny.adapter(1), tmp_path / "own"))
        refused = error(own, 422, "modules_to_save_unsupported", CONFIG_FILE)["message"]
        assert "RANK_SLOTS" in refused
        assert "one worker" in refused
        other = with_head(tiny.adapter(1), tmp_path / "other", modules_to_save=["score", "embed_tokens"])
        whole = error(await site.upload("acme", "o", other), 422, "modules_to_save_unsupported", CONFIG_FILE)
        assert "RANK_SLOTS" not in whole["message"]


async def test_a_gateway_knows_that_its_replicas_classify(tmp_path: Path) -> None:
    async with fleet(tmp_path, replicas=1, base=CLASSIFIER) as made:
        adapters = {"five": with_head(tiny.adapter(1), tmp_path / "five")}
        key = await made.gateway.tenant("acme", adapters)
        answer = (await ask(made.gateway, key, "five", ["why", "not"])).json()
        assert [len(one["probs"]) for one in answer["data"]] == [5, 5]
        error(await score(made.gateway, key, "five"), 400, "not_supported_by_base", "model")
        one = with_head(tiny.adapter(2), tmp_path / "one", labels=1)
        assert (await made.gateway.upload("acme", "one", one)).status_code == 201
        ranked = await score(made.gateway, key, "one")
        assert ranked.status_code == 200, ranked.text
        assert len(ranked.json()["results"]) == 3
        refused = error(await made.gateway.chat(key, "Hi", model="five"), 400, "not_supported_by_base")
        assert "/v1/classify" in refused["message"]

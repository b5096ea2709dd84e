"""What a server with an embedding model answers, over HTTP; on the fake engine and on the real one.

A module that takes the suite provides ``site``, ``adapters`` and ``key``: the key of the tenant ``acme``, who
has the ``adapters`` as ``a`` and ``b``.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
from safetensors.torch import load_file, save

from adapters.model import CONFIG_FILE, PROBES_FILE, WEIGHTS_FILE
from server.engine.calls import Call
from server.errors import Unavailable
from tests.service.http.test_api import error
from tests.support.site import Site, bearer

URL = "/v1/embeddings"
# A difference of a component that comes from rounding, and one that does not.
SAME, OTHER = 1e-4, 1e-3
TEXTS = ["the sky is blue", "why", "the capital of France is Paris and the sky is blue"]
IDS = [5, 17, 3, 8]
GENERATING: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"model": "a", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
    "/v1/messages/count_tokens": {"model": "a", "messages": [{"role": "user", "content": "Hi"}]},
}
LONG = "why " * 2000
WRONG: list[tuple[dict[str, Any], str | None, str | None]] = [
    ({"input": []}, "invalid_request", "input"),
    ({"input": ["why"] * 2049}, "invalid_request", "input"),
    ({"input": [{"role": "user", "content": "Hi"}]}, "invalid_request", None),
    ({"input": {"text": "Hi"}}, "invalid_request", None),
    ({}, "invalid_request", "input"),
    ({"input": "why", "encoding_format": "bytes"}, "invalid_request", "encoding_format"),
    ({"input": "why", "encoding_format": "int8"}, "invalid_request", "encoding_format"),
    ({"input": "why", "dimensions": 4}, "invalid_request", None),
    ({"input": [5, 10_000_000]}, "invalid_request", None),
    ({"input": [[5], [-1]]}, "invalid_request", None),
    ({"input": LONG}, "context_length_exceeded", "input"),
    ({"input": ["why", LONG]}, "context_length_exceeded", "input"),
    ({"input": [5] * 5000}, "context_length_exceeded", "input"),
    ({"input": "why", "cache_salt": "x"}, "unknown_field", "cache_salt"),
    ({"input": "why", "priority": -1}, "unknown_field", "priority"),
    ({"input": "why", "stream": True}, "unknown_field", "stream"),
]


async def ask(site: Site, key: str, given: Any, model: str = "a", **more: Any) -> httpx.Response:
    return await site.http.post(URL, json={"model": model, "input": given, **more}, headers=bearer(key))


async def vectors(site: Site, key: str, given: Any, model: str = "a") -> list[list[float]]:
    answer = await ask(site, key, given, model)
    assert answer.status_code == 200, answer.text
    return [one["embedding"] for one in answer.json()["data"]]


def far(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference of a component."""
    return max(abs(x - y) for x, y in zip(one, other, strict=True))


async def used(site: Site, tenant: str) -> dict[str, Any]:
    await site.services.usage_writer.flush()
    shown = await site.admin.get("/admin/v1/usage", params={"by": "tenant"})
    rows = {row["tenant"]: row for row in shown.json()["data"]}
    return rows.get(tenant, {"requests": 0, "prompt_tokens": 0, "output_tokens": 0})


class Counted:
    """A meter."""

    def __init__(self) -> None:
        self.parts: dict[str, tuple[int, int, int]] = {}

    def finished(self, reasons: Sequence[str | None]) -> None:
        assert not list(reasons), "an embedding has no answer that ends"

    def progressed(self, part: str, prompt_tokens: int, output_tokens: int, cached_tokens: int) -> None:
        self.parts[part] = prompt_tokens, output_tokens, cached_tokens


class EmbeddingSuite:
    async def test_the_openai_client_gets_embeddings(self, site: Site, key: str) -> None:
        """It asks for base64 by itself, and decodes it."""
        client = site.openai(key)
        made = await client.embeddings.create(model="a", input=TEXTS)
        assert (made.model, made.object) == ("a", "list")
        assert [(one.index, one.object) for one in made.data] == [(i, "embedding") for i in range(3)]
        assert all(math.hypot(*one.embedding) == pytest.approx(1, abs=1e-4) for one in made.data)
        assert made.usage.prompt_tokens == made.usage.total_tokens >= sum(len(t.split()) for t in TEXTS)
        plain = await client.embeddings.create(model="a", input=TEXTS, encoding_format="float", user="eve")
        for one, other in zip(made.data, plain.data, strict=True):
            assert far(one.embedding, other.embedding) < 1e-5
        (alone,) = (await client.embeddings.create(model="a@1", input=TEXTS[1])).data
        assert far(alone.embedding, made.data[1].embedding) < SAME

    async def test_each_adapter_has_its_own(self, site: Site, key: str) -> None:
        base = site.services.engine.base.name
        found = await asyncio.gather(*(vectors(site, key, TEXTS, model) for model in ("a", "b", base)))
        for text in range(len(TEXTS)):
            one, other, bare = (of_model[text] for of_model in found)
            assert min(far(one, other), far(one, bare), far(other, bare)) > OTHER
        assert far((await vectors(site, key, TEXTS, "default"))[0], found[0][0]) < SAME

    async def test_answers_are_as_documented(self, site: Site, key: str) -> None:
        document = (await site.http.get("/openapi.json")).json()
        assert "post" in document["paths"][URL]
        for encoding in ("float", "base64"):
            answer = (await ask(site, key, TEXTS, encoding_format=encoding)).json()
            jsonschema_rs.validate({"$ref": "#/components/schemas/EmbeddingList", **document}, answer)

    async def test_token_ids(self, site: Site, key: str) -> None:
        (one,) = await vectors(site, key, IDS)
        both = await vectors(site, key, [IDS, IDS[:2]])
        assert far(one, both[0]) < SAME < OTHER < far(*both)

    async def test_more_inputs_than_the_engine_has_places(self, site: Site, key: str) -> None:
        number = 2 * site.services.engine.max_running + 3
        inputs = [[i % 30 + 1, i // 30 + 1] for i in range(number)]
        answer = (await ask(site, key, inputs)).json()
        assert [one["index"] for one in answer["data"]] == list(range(number))
        assert answer["usage"] == {"prompt_tokens": 2 * number, "total_tokens": 2 * number}
        for at in (0, 1, number - 1):
            (alone,) = await vectors(site, key, inputs[at])
            assert far(alone, answer["data"][at]["embedding"]) < SAME

    async def test_usage_is_what_clients_were_told(self, site: Site, key: str) -> None:
        before = await used(site, "acme")
        answers = await asyncio.gather(
            *(ask(site, key, given, model) for given in (TEXTS, TEXTS[0], IDS) for model in ("a", "b@1"))
        )
        told = sum(answer.json()["usage"]["prompt_tokens"] for answer in answers)
        after = await used(site, "acme")
        assert after["requests"] - before["requests"] == 6
        assert after["prompt_tokens"] - before["prompt_tokens"] == told > 0
        assert after["output_tokens"] == 0

    @pytest.mark.parametrize(("body", "code", "param"), WRONG)
    async def test_what_is_wrong_is_refused(
        self, site: Site, key: str, body: dict[str, Any], code: str, param: str | None
    ) -> None:
        answer = await site.http.post(URL, json={"model": "a", **body}, headers=bearer(key))
        assert answer.status_code == 400, answer.text
        found = answer.json()["error"]
        assert found["code"] == code, found
        assert param is None or found["param"] == param
        assert len(await vectors(site, key, "why")) == 1, "the server goes on"

    async def test_who_may(self, site: Site, key: str) -> None:
        error(await ask(site, key, "why", "other"), 404, "model_not_found", "model")
        error(await ask(site, "lp-wrong", "why"), 401, "invalid_api_key")

    async def test_it_makes_no_text(self, site: Site, key: str) -> None:
        for url, body in GENERATING.items():
            answer = await site.http.post(url, json=body, headers=bearer(key))
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["code"] == "not_supported_by_base"
            assert "/v1/embeddings" in answer.json()["error"]["message"]
        tokens = await site.http.post("/tokenize", json={"prompt": TEXTS[0]}, headers=bearer(key))
        assert tokens.status_code == 200, tokens.text

    async def test_the_probe_compares_embeddings(self, site: Site, key: str, adapters: list[Path]) -> None:
        shown = (await site.admin.get("/admin/v1/tenants/acme/adapters/a")).json()
        probe = shown["versions"][0]["report"]["probe"]
        assert probe["effect"] is True
        assert probe["change"] > OTHER
        assert 0 < probe["cosine"] <= 2
        assert 0 <= probe["noise"]["change"] < 1e-4
        assert probe["engine"].endswith(" pooling") or probe["engine"].startswith("fake")

    async def test_an_adapter_without_effect_is_refused(
        self, site: Site, key: str, adapters: list[Path]
    ) -> None:
        url = "/admin/v1/tenants/acme/adapters/faint/versions"
        tensors = load_file(adapters[0] / WEIGHTS_FILE)
        faint = {name: tensor * 1e-12 if "lora_B" in name else tensor for name, tensor in tensors.items()}
        files = {CONFIG_FILE: (adapters[0] / CONFIG_FILE).read_bytes(), WEIGHTS_FILE: save(faint)}
        refused = error(await site.admin.post(url, files=files), 422, "adapter_no_effect")
        assert "no embedding moves" in refused["message"]
        forced = await site.admin.post(f"{url}?allow_no_effect=true", files=files)
        assert forced.status_code == 201, forced.text
        assert forced.json()["report"]["probe"]["change"] <= 1e-4

    async def test_what_is_aborted_is_no_answer(self, site: Site, key: str) -> None:
        engine = site.services.engine
        name = engine.base.name
        call = Call("1", "embedding", name, name, "salt", Counted())
        request = engine.parse("embedding", {"input": [IDS, IDS[:2]]})
        answering = asyncio.create_task(engine.answer(call, request))
        while not call.request_ids:
            await asyncio.sleep(0)
        await engine.abort(call)
        with pytest.raises(Unavailable) as caught:
            await answering
        assert caught.value.code == "shutting_down"
        again = Call("2", "embedding", name, name, "salt", counted := Counted())
        assert len((await engine.answer(again, request)).body["data"]) == 2
        assert sorted(counted.parts.values()) == [(2, 0, 0), (4, 0, 0)], "its prompt alone is counted"

    async def test_golden_probes_are_refused(self, site: Site, key: str, adapters: list[Path]) -> None:
        files = {name: (adapters[0] / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
        golden = {"probes": [{"prompt": [1, 2], "log_probs": [-1.0]}]}
        files[PROBES_FILE] = json.dumps(golden).encode()
        url = "/admin/v1/tenants/acme/adapters/golden/versions"
        error(await site.admin.post(url, files=files), 422, "probes_unsupported")

    async def test_documents_are_ranked_by_their_embeddings(self, site: Site, key: str) -> None:
        query, *documents = TEXTS
        (one, *others) = await vectors(site, key, TEXTS)
        cosines = [sum(x * y for x, y in zip(one, other, strict=True)) for other in others]
        body = {"model": "a", "query": query, "documents": documents}
        ranked = await site.http.post("/v1/rerank", json=body, headers=bearer(key))
        assert ranked.status_code == 200, ranked.text
        found = ranked.json()
        order = sorted(range(len(documents)), key=lambda place: -cosines[place])
        assert [result["index"] for result in found["results"]] == order
        for result in found["results"]:
            assert result["relevance_score"] == pytest.approx(cosines[result["index"]], abs=1e-4)
            assert result["document"] == {"text": documents[result["index"]]}
        best = {**body, "documents": [{"text": text} for text in documents], "top_n": 1}
        best["return_documents"] = False
        top = (await site.http.post("/v1/rerank", json=best, headers=bearer(key))).json()
        assert [set(result) for result in top["results"]] == [{"index", "relevance_score"}]
        before = await used(site, "acme")
        sent = {"model": "a", "text_1": query, "text_2": documents}
        scored = (await site.http.post("/v1/score", json=sent, headers=bearer(key))).json()
        assert [each["score"] for each in scored["data"]] == pytest.approx(cosines, abs=1e-4)
        after = await used(site, "acme")
        assert after["requests"] - before["requests"] == 1
        assert after["prompt_tokens"] - before["prompt_tokens"] == scored["usage"]["prompt_tokens"] > 0
        pairs = {"model": "a", "queries": TEXTS, "documents": TEXTS[::-1]}
        by_pair = (await site.http.post("/v1/score", json=pairs, headers=bearer(key))).json()
        assert [each["score"] for each in by_pair["data"]][1] == pytest.approx(1.0, abs=1e-4)
        rows = (await site.admin.get("/admin/v1/requests?limit=2")).json()["data"]
        assert {row["endpoint"] for row in rows} == {"score"}

    @pytest.mark.parametrize(
        ("url", "body", "param"),
        [
            ("/v1/rerank", {"documents": ["a"]}, "query"),
            ("/v1/rerank", {"query": ["a"], "documents": ["a"]}, "query"),
            ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
            ("/v1/rerank", {"query": "a", "documents": [1]}, "documents"),
            ("/v1/rerank", {"query": "a", "documents": [{"title": "a"}]}, "documents"),
            ("/v1/rerank", {"query": "a", "documents": ["a"] * 1025}, "documents"),
            ("/v1/rerank", {"query": "a", "documents": ["a"], "top_n": 1.5}, "top_n"),
            ("/v1/rerank", {"query": "a", "documents": ["a"], "top_n": -1}, "top_n"),
            ("/v1/rerank", {"query": "a", "documents": ["a"], "max_tokens_per_doc": 4}, "max_tokens_per_doc"),
            ("/v1/rerank", {"query": "a", "documents": ["a"], "priority": 1}, "priority"),
            ("/v1/score", {"text_1": "a"}, "text_2"),
            ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
            ("/v1/score", {"text_1": "a", "text_2": "b", "queries": "c"}, "text_1"),
        ],
    )
    async def test_wrong_scores(
        self, site: Site, key: str, url: str, body: dict[str, Any], param: str
    ) -> None:
        refused = await site.http.post(url, json={"model": "a", **body}, headers=bearer(key))
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["param"] == param

    @pytest.mark.parametrize(
        ("url", "body", "param"),
        [
            ("/v1/rerank", {"query": LONG, "documents": ["a", "b"]}, "query"),
            ("/v1/rerank", {"query": "a", "documents": ["a", {"text": LONG}]}, "documents.1"),
            ("/v1/score", {"text_1": LONG, "text_2": ["a", "b"]}, "text_1"),
            ("/v1/score", {"queries": ["a", "b"], "documents": ["a", LONG]}, "documents.1"),
        ],
    )
    async def test_scores_of_texts_that_are_too_long(
        self, site: Site, key: str, url: str, body: dict[str, Any], param: str
    ) -> None:
        refused = await site.http.post(url, json={"model": "a", **body}, headers=bearer(key))
        error(refused, 400, "context_length_exceeded", param)
        assert refused.headers["X-Loraplex-Version"] == "a@1"

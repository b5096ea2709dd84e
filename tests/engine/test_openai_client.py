"""The official client, unchanged, against the real engine."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import anthropic
import openai
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.reference import ATTENTION, Reference, Spec
from tests.support.site import SERVICE_KEY, Site, bearer

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

QUESTION = [{"role": "user", "content": "Name three colours."}]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def key(site: Site, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("paint")
    reference.make(Spec(seed=900, rank=8, targets=ATTENTION), folder)
    return await site.tenant("painter", {"brush": folder})


async def test_models_are_the_tenants_own(site: Site, key: str) -> None:
    models = (await site.openai(key).models.list()).data
    assert [m.id for m in models] == ["brush", "SmolLM2-135M-Instruct"]
    assert models[0].owned_by == "painter"
    raw = (await site.http.get("/v1/models", headers=bearer(key))).json()["data"][0]
    assert raw["parent"] == "SmolLM2-135M-Instruct"
    assert "/" not in json.dumps(raw), "a file path leaked"
    assert (await site.openai(key).models.retrieve("brush")).id == "brush"


async def test_chat_answers_under_the_customers_name(site: Site, key: str) -> None:
    client = site.openai(key)
    named = await client.chat.completions.create(
        model="brush", messages=QUESTION, max_tokens=8, temperature=0
    )
    assert named.model == "brush"
    assert named.usage is not None
    assert named.usage.completion_tokens == 8
    default = await client.chat.completions.create(
        model="default", messages=QUESTION, max_tokens=8, temperature=0
    )
    assert default.model == "brush"
    assert default.choices[0].message.content == named.choices[0].message.content
    pinned = await client.chat.completions.create(
        model="brush@1", messages=QUESTION, max_tokens=8, temperature=0
    )
    assert pinned.model == "brush@1"
    base = await client.chat.completions.create(
        model="SmolLM2-135M-Instruct", messages=QUESTION, max_tokens=8, temperature=0
    )
    assert base.model == "SmolLM2-135M-Instruct"
    assert base.choices[0].message.content != named.choices[0].message.content


async def test_streaming_says_the_same_as_not_streaming(site: Site, key: str) -> None:
    client = site.openai(key)
    whole = await client.chat.completions.create(
        model="brush", messages=QUESTION, max_tokens=12, temperature=0
    )
    stream = await client.chat.completions.create(
        model="brush",
        messages=QUESTION,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert (
        "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        == whole.choices[0].message.content
    )
    assert chunks[-1].usage == whole.usage
    assert {c.model for c in chunks} == {"brush"}


async def test_logprobs_n_stop_and_seed(site: Site, key: str) -> None:
    client = site.openai(key)
    made = await client.chat.completions.create(
        model="brush", messages=QUESTION, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    assert made.choices[0].logprobs is not None
    assert made.choices[0].logprobs.content is not None
    assert [len(t.top_logprobs) for t in made.choices[0].logprobs.content] == [3] * 6
    several = await client.chat.completions.create(
        model="brush", messages=QUESTION, max_tokens=6, n=3, seed=7
    )
    again = await client.chat.completions.create(model="brush", messages=QUESTION, max_tokens=6, n=3, seed=7)
    texts = [c.message.content for c in several.choices]
    assert len(texts) == 3
    assert texts == [c.message.content for c in again.choices]
    first = made.choices[0].message.content or ""
    stop = first.split()[1]
    stopped = await client.chat.completions.create(
        model="brush", messages=QUESTION, max_tokens=6, temperature=0, stop=[stop]
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert stop not in (stopped.choices[0].message.content or "")


async def test_structured_output(site: Site, key: str) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"type": "string", "enum": ["red", "green", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    made = await site.openai(key).chat.completions.create(
        model="brush",
        messages=QUESTION,
        max_tokens=40,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "pick", "schema": schema}},
    )
    assert json.loads(made.choices[0].message.content or "")["colour"] in ("red", "green", "blue")


async def test_text_completions(site: Site, key: str) -> None:
    client = site.openai(key)
    made = await client.completions.create(
        model="brush", prompt="Red, green", max_tokens=5, temperature=0, logprobs=2
    )
    assert made.model == "brush"
    assert made.choices[0].logprobs is not None
    assert len(made.choices[0].logprobs.token_logprobs or ()) == 5
    two = await client.completions.create(model="brush", prompt=["Red,", "One,"], max_tokens=4, temperature=0)
    assert [c.index for c in two.choices] == [0, 1]
    stream = await client.completions.create(
        model="brush", prompt="Red, green", max_tokens=5, temperature=0, stream=True
    )
    assert "".join([c.choices[0].text async for c in stream]) == made.choices[0].text


async def test_errors_raise_the_clients_own_classes(site: Site, key: str) -> None:
    client = site.openai(key)
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="nobody", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        await site.openai("lp-wrong").chat.completions.create(model="brush", messages=QUESTION)
    for extra in ("cache_salt", "priority", "kv_transfer_params", "vllm_xargs", "lora_path"):
        with pytest.raises(openai.BadRequestError) as unknown:
            await client.chat.completions.create(model="brush", messages=QUESTION, extra_body={extra: 1})
        assert (unknown.value.code, unknown.value.param) == ("unknown_field", extra)
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(
            model="brush", messages=QUESTION, extra_headers={"X-Vllm-Priority": "-9"}
        )
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.chat.completions.create(model="brush", messages=QUESTION, temperature=-1)
    assert "temperature" in str(wrong.value)
    long = [{"role": "user", "content": "word " * 3000}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model="brush", messages=long, stream=stream)


async def test_a_gateway_names_the_customer(site: Site, key: str) -> None:
    body = {"messages": QUESTION, "max_tokens": 4, "temperature": 0}
    url = "/v1/chat/completions"
    by_service = await site.http.post(
        url, json=body, headers={**bearer(SERVICE_KEY), "X-Customer-ID": "painter"}
    )
    by_key = await site.http.post(url, json=body, headers=bearer(key))
    assert by_service.status_code == 200
    assert by_service.json()["choices"] == by_key.json()["choices"]
    same = await site.http.post(url, json=body, headers={**bearer(key), "X-Customer-ID": "painter"})
    assert same.status_code == 200
    other = await site.http.post(url, json=body, headers={**bearer(key), "X-Customer-ID": "somebody"})
    assert other.status_code == 403


async def test_no_metric_has_a_series_for_each_set_of_adapters_that_ran_together(
    site: Site, key: str
) -> None:
    await site.openai(key).chat.completions.create(model="brush", messages=QUESTION, max_tokens=4)
    found = await _metrics(site)
    assert any(name.startswith("vllm:") for name, _ in found)
    named = {name for name, labels in found if any("/brush@" in value for _, value in labels)}
    assert named <= {"vllm:lora_adapter_loaded"}, "which has one series for each adapter that is loaded"


async def test_metrics_add_up(site: Site, key: str) -> None:
    before = await _metrics(site)
    client = site.openai(key)
    usages = []
    for stream in (False, True):
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        made = await client.chat.completions.create(model="brush", messages=QUESTION, max_tokens=9, **options)
        usages.append([c async for c in made][-1].usage if stream else made.usage)
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="nobody", messages=QUESTION)
    after = await _metrics(site)

    def change(name: str, **labels: str) -> float:
        key_ = (name, frozenset(labels.items()))
        return after.get(key_, 0) - before.get(key_, 0)

    assert change("loraplex_requests_total", tenant="painter", outcome="completed") == 2
    assert change("loraplex_requests_total", tenant="painter", outcome="rejected") == 1
    assert change("loraplex_prompt_tokens_total", tenant="painter") == sum(u.prompt_tokens for u in usages)
    assert change("loraplex_output_tokens_total", tenant="painter") == sum(
        u.completion_tokens for u in usages
    )
    assert change("loraplex_time_to_first_token_seconds_count", tenant="painter") == 1
    assert (
        change("loraplex_inter_token_latency_seconds_count", tenant="painter")
        == usages[1].completion_tokens - 1
    )
    assert change("loraplex_queue_seconds_count", tenant="painter") == 2
    assert after[("loraplex_in_step_loads", frozenset())] == 0
    assert any(name.startswith("vllm:") for name, _ in after)


async def test_a_client_that_hangs_up_frees_its_place(site: Site, key: str) -> None:
    engine, dispatcher = site.services.engine, site.services.dispatcher
    body = {"messages": QUESTION, "max_tokens": 900, "logit_bias": {"2": -100}}
    for stream in (True, False):
        before = await _metrics(site)
        async with (
            site.http.stream(
                "POST", "/v1/chat/completions", json={**body, "stream": stream}, headers=bearer(key)
            )
            if stream
            else _Hanging(site, key, body) as response
        ):
            if stream:
                lines = response.aiter_lines()
                for _ in range(6):
                    await anext(lines)
        assert await dispatcher.wait_until_idle(240)
        assert engine._llm.get_num_unfinished_requests() == 0
        after = await _metrics(site)
        labels = frozenset({("tenant", "painter"), ("outcome", "disconnected")})
        name = ("loraplex_requests_total", labels)
        assert after[name] - before.get(name, 0) == 1
        tokens = ("loraplex_output_tokens_total", frozenset({("tenant", "painter")}))
        assert 0 < after[tokens] - before[tokens] < 900, "what was produced for nobody is counted"


class _Hanging:
    """A request without streaming, whose client goes away once it has produced a few tokens."""

    def __init__(self, site: Site, key: str, body: dict[str, object]) -> None:
        self._site = site
        self._task = asyncio.ensure_future(
            site.http.post("/v1/chat/completions", json=body, headers=bearer(key))
        )

    async def __aenter__(self) -> None:
        leases = self._site.services.dispatcher.open_leases
        async with asyncio.timeout(240):
            while not any(lease.output_tokens > 5 for lease in leases()):
                await asyncio.sleep(0.02)

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def test_upload_of_a_foreign_adapter_is_refused(site: Site, key: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=2)
    )  # fmt: skip
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(tiny, config).save_pretrained(tmp_path)
    refused = await site.upload("painter", "alien", tmp_path)
    assert refused.status_code == 422
    assert refused.json()["error"]["code"] == "shape_mismatch"
    assert (await site.admin.get("/admin/v1/tenants/painter/adapters/alien")).status_code == 404


async def _metrics(site: Site) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = (await site.http.get("/metrics")).text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# --- the rest of the surface ------------------------------------------------------------------------


async def test_responses_by_the_official_client(site: Site, key: str) -> None:
    client = site.openai(key)
    chat = await client.chat.completions.create(model="brush", messages=QUESTION, max_tokens=8, temperature=0)
    made = await client.responses.create(
        model="brush", input=QUESTION[0]["content"], max_output_tokens=8, temperature=0
    )
    assert made.output_text == chat.choices[0].message.content
    assert (made.model, made.status) == ("brush", "incomplete")
    assert chat.usage is not None
    assert made.usage is not None
    assert (made.usage.input_tokens, made.usage.output_tokens) == (chat.usage.prompt_tokens, 8)
    asked = {"model": "brush", "input": QUESTION, "max_output_tokens": 8, "temperature": 0}
    async with client.responses.stream(**asked) as stream:
        types = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert types[:2] == ["response.created", "response.in_progress"]
    assert types[-1] == "response.completed"
    assert final.output_text == made.output_text
    assert final.usage is not None
    assert final.usage.output_tokens == 8


async def test_a_response_in_json(site: Site, key: str) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"type": "string", "enum": ["red", "green", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    made = await site.openai(key).responses.create(
        model="brush",
        input="Name a colour.",
        max_output_tokens=40,
        temperature=0,
        text={"format": {"type": "json_schema", "name": "pick", "schema": schema}},
    )
    assert json.loads(made.output_text)["colour"] in ("red", "green", "blue")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_schema_that_is_none_is_refused_before_the_first_byte(
    site: Site, key: str, stream: bool
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(("}}}
    for url, body in (
        (
            "/v1/chat/completions",
            {
                "messages": QUESTION,
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
            },
        ),
        (
            "/v1/responses",
            {"input": "hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}},
        ),
        (
            "/v1/messages",
            {
                "messages": QUESTION,
                "max_tokens": 8,
                "output_config": {"format": {"type": "json_schema", "schema": schema}},
            },
        ),
    ):
        refused = await site.http.post(url, json={**body, "stream": stream}, headers=bearer(key))
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["code"] == "invalid_request"


async def test_messages_by_the_official_client(site: Site, key: str) -> None:
    client = site.anthropic(key)
    chat = await site.openai(key).chat.completions.create(
        model="brush", messages=QUESTION, max_tokens=8, temperature=0
    )
    greedy = {"extra_body": {"temperature": 0}}
    made = await client.messages.create(model="brush", messages=QUESTION, max_tokens=8, **greedy)
    assert [b.text for b in made.content if b.type == "text"] == [chat.choices[0].message.content]
    assert (made.model, made.stop_reason) == ("brush", "max_tokens")
    assert chat.usage is not None
    assert (made.usage.input_tokens, made.usage.output_tokens) == (chat.usage.prompt_tokens, 8)
    async with client.messages.stream(model="brush", messages=QUESTION, max_tokens=8, **greedy) as stream:
        spoken = "".join([text async for text in stream.text_stream])
        final = await stream.get_final_message()
    assert spoken == chat.choices[0].message.content
    assert final.usage.output_tokens == 8
    counted = await client.messages.count_tokens(model="brush", messages=QUESTION)
    assert counted.input_tokens == made.usage.input_tokens
    with pytest.raises(anthropic.NotFoundError):
        await client.messages.create(model="nobodys", messages=QUESTION, max_tokens=8)


async def test_tokens_of_the_customers_adapter(site: Site, key: str) -> None:
    asked = {"model": "brush", "prompt": "Red, green"}
    told = (await site.http.post("/tokenize", json=asked, headers=bearer(key))).json()
    assert told["count"] == len(told["tokens"])
    back = await site.http.post("/detokenize", json={"tokens": told["tokens"]}, headers=bearer(key))
    assert back.json() == {"prompt": "Red, green"}
    made = await site.openai(key).completions.create(model="brush", prompt="Red, green", max_tokens=1)
    assert made.usage is not None
    assert made.usage.prompt_tokens == told["count"]

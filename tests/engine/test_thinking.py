"""A base that thinks, on an engine of its own: a tiny random Qwen3 with tags for thoughts in its template.

Nothing else shows it: what is read as a thought depends on the base's template. Its embedding has rows with
no token, too, which special tokens of an adapter's own may have. Requests of every sort are asked of it alone
and all at once.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from server.app import create_app
from tests.engine.reference import ATTENTION
from tests.support import company
from tests.support.site import Site, bearer, engine_settings, serving
from tests.support.trainer import draw

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

SPARE = 6
SEED = int(os.environ.get("SEED", "1"))  # of the company
TURNS: list[Any] = [{"role": "user", "content": "Name a colour."}]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
    "{% if enable_thinking is defined and enable_thinking is false %}\n</think>\n\n{% endif %}{% endif %}"
)
CHAT: dict[str, Any] = {"messages": TURNS, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
BUDGET = {"thinking_token_budget": 5}
QUIET = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def base(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3") / "thinker"
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + SPARE, hidden_size=128, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
        tie_word_embeddings=True, initializer_range=0.1, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(base: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    settings = engine_settings(
        base,
        tmp_path_factory.mktemp("thinking"),
        gpu_slots=3,
        host_slots=4,
        max_lora_rank=8,
        max_model_len=512,
        engine_args={"dtype": "float32", "max_num_seqs": 8, "max_num_batched_tokens": 32},
    )
    async with serving(create_app(settings)) as site:
        yield site


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def key(site: Site) -> str:
    return await site.tenant("thinkers", base_allowed=True)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    model = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM"))
    draw(adapted, of="lora_B", std=0.3)
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(folder)
    return {file: (folder / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE)}


async def ask(site: Site, key: str, url: str, **body: Any) -> httpx.Response:
    body = {"model": "thinker", **body}
    return await site.http.post(url, json=body, headers=bearer(key))


async def told(site: Site, key: str, url: str, **body: Any) -> dict[str, Any]:
    said = await ask(site, key, url, **body)
    assert said.status_code == 200, said.text
    return dict(said.json())


async def message(site: Site, key: str, **fields: Any) -> dict[str, Any]:
    return dict(
        (await told(site, key, "/v1/chat/completions", **{**CHAT, **fields}))["choices"][0]["message"]
    )


async def test_thoughts_are_told_from_the_answer(site: Site, key: str) -> None:
    bound, open_end, quiet, unsaid = await asyncio.gather(
        message(site, key, **BUDGET),
        message(site, key),
        message(site, key, **QUIET),
        message(site, key, **BUDGET, include_reasoning=False),
    )
    assert bound["reasoning"]
    assert bound["content"]
    assert open_end["reasoning"].startswith(bound["reasoning"].rstrip())
    assert not open_end["content"]
    assert quiet["content"]
    assert not quiet.get("reasoning")
    assert unsaid["content"] == bound["content"]
    assert not unsaid.get("reasoning")
    for one in (bound, open_end, quiet):
        assert "think>" not in json.dumps(one)
    server = (await site.admin.get("/admin/v1/server")).json()
    assert server["parsers"]["reasoning_parser"] == "qwen3", server["parsers"]


async def test_a_stream_tells_thoughts_first(site: Site, key: str) -> None:
    whole = await message(site, key, **BUDGET)
    stream = await site.openai(key).chat.completions.create(
        model="thinker", messages=TURNS, max_tokens=16, temperature=0, stream=True,
        extra_body={**BUDGET, "ignore_eos": True},
    )  # fmt: skip
    deltas = [chunk.choices[0].delta async for chunk in stream if chunk.choices]
    thoughts = [getattr(delta, "reasoning", None) or "" for delta in deltas]
    words = [delta.content or "" for delta in deltas]
    assert ("".join(thoughts), "".join(words)) == (whole["reasoning"], whole["content"])
    last_thought = max(n for n, text in enumerate(thoughts) if text)
    assert last_thought < min(n for n, text in enumerate(words) if text)


async def test_a_response_has_an_item_for_it(site: Site, key: str) -> None:
    asked: dict[str, Any] = {
        "model": "thinker",
        "input": "Name a colour.",
        "max_output_tokens": 16,
        "temperature": 0,
    }
    told = await site.openai(key).responses.create(**asked)
    assert [item.type for item in told.output] == ["reasoning"]
    assert told.status == "incomplete"
    quiet = await site.openai(key).responses.create(**asked, extra_body=QUIET)
    assert [item.type for item in quiet.output] == ["message"]
    assert quiet.output_text


async def test_a_message_has_a_block_for_it(site: Site, key: str) -> None:
    asked: dict[str, Any] = {"model": "thinker", "messages": TURNS, "max_tokens": 16}
    asked["extra_body"] = {"temperature": 0}  # which the client's types no longer have
    told = await site.anthropic(key).messages.create(**asked)
    assert [block.type for block in told.content] == ["thinking"]
    quiet = await site.anthropic(key).messages.create(**asked, thinking={"type": "disabled"})
    assert [block.type for block in quiet.content] == ["text"]
    async with site.anthropic(key).messages.stream(**asked) as stream:
        final = await stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking"]
    assert getattr(final.content[0], "thinking", None) == getattr(told.content[0], "thinking", "")


async def test_structure_begins_after_the_thought(site: Site, key: str) -> None:
    said = await message(site, key, **BUDGET, guided_choice=["violet"], ignore_eos=False)
    assert said["reasoning"]
    assert said["content"].strip() == "violet"


async def test_tokens_in_rows_without_one_are_read(
    site: Site, key: str, base: Path, adapter: dict[str, bytes]
) -> None:
    first = len(AutoTokenizer.from_pretrained(base))
    own = {"<|tool|>": first, "<|note|>": first + SPARE - 1}
    decoder = {str(number): {"content": text, "special": True} for text, number in own.items()}
    template = "{% for m in messages %}<|tool|>{{ m.content }}<|note|>{% endfor %}"
    files = adapter | {
        "tokenizer_config.json": json.dumps(
            {"added_tokens_decoder": decoder, "chat_template": template}
        ).encode()
    }
    url = "/admin/v1/tenants/thinkers/adapters/own/versions"
    made = await site.admin.post(url, files=files)
    assert made.status_code == 201, made.text
    assert made.json()["report"]["chat"]["tokens"] == own
    read = (await told(site, key, "/tokenize", model="own", messages=TURNS))["tokens"]
    assert (read[0], read[-1]) == (first, first + SPARE - 1)
    plain = (await told(site, key, "/tokenize", prompt="Name a colour.", add_special_tokens=False))["tokens"]
    assert read[1:-1] == plain
    ids: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    chat, text, numbers, others = await asyncio.gather(
        told(site, key, "/v1/chat/completions", model="own", messages=TURNS, **ids),
        told(site, key, "/v1/completions", model="own", prompt="<|tool|>Name a colour.<|note|>", **ids),
        told(site, key, "/v1/completions", model="own", prompt=read, **ids),
        told(site, key, "/v1/completions", prompt="<|tool|>Name a colour.<|note|>", **ids),
    )
    assert chat["prompt_token_ids"] == read
    assert text["choices"][0]["prompt_token_ids"] == read
    assert first not in others["choices"][0]["prompt_token_ids"]
    assert (
        chat["choices"][0]["token_ids"]
        == text["choices"][0]["token_ids"]
        == numbers["choices"][0]["token_ids"]
    )
    beyond = {"added_tokens_decoder": {str(first + SPARE): {"content": "<|tool|>", "special": True}}}
    refused = await site.admin.post(
        url.replace("own", "beyond"), files=adapter | {"tokenizer_config.json": json.dumps(beyond).encode()}
    )
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "added_tokens")
    assert "embedding ends with" in refused.json()["error"]["message"]


# What an adapter of the company adapts, and how.
KINDS: list[dict[str, Any]] = [
    {"r": 4, "target_modules": "all-linear"},
    {"r": 8, "target_modules": ["q_proj", "lm_head"]},
    {"r": 1, "target_modules": ["up_proj", "embed_tokens"]},
    {"r": 2, "target_modules": ["down_proj", "k_proj"], "use_dora": True},
]


async def test_an_answer_is_the_same_alone_and_in_company(site: Site, base: Path, tmp_path: Path) -> None:
    """Prompts are read in pieces, adapters outnumber slots, and clients go away."""
    keys = []
    for number in range(2):  # what has the same name is another adapter with the other customer
        folders = {}
        for place, kind in enumerate(KINDS):
            torch.manual_seed(10 * number + place)
            model = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32)
            adapted = get_peft_model(model, LoraConfig(lora_alpha=8, task_type="CAUSAL_LM", **kind))
            draw(adapted, std=0.2)
            folders[f"a{place}"] = tmp_path / f"{number}-{place}"
            adapted.save_pretrained(folders[f"a{place}"], save_embedding_layers=False)
        keys.append(await site.tenant(f"company-{number}", folders, base_allowed=True))
    random = Random(SEED)
    models = ["thinker", *folders]
    asked = [company.draw(random, keys, models) for _ in range(48)]
    others = [company.draw(random, keys, models) for _ in range(8)]
    alone = [await company.ask(site.http, one) for one in asked]
    together = await company.asked_together(site.http, random, asked, others)
    wrong = [
        f"{one.url} {one.body}: {found[:5]}"
        for one, first, second in zip(asked, alone, together, strict=True)
        if (found := company.differences(first, second))
    ]
    assert not wrong, "\n".join([f"seed {SEED}", *wrong])
    assert (await site.services.engine.report()).in_step_loads == 0

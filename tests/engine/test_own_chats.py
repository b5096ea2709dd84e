"""Two adapters with chat templates of their own beside one with the base's, on the real engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from tests.engine.reference import ATTENTION, Reference, Spec
from tests.support.site import Site, bearer

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

TURNS: list[Any] = [{"role": "user", "content": "Name a colour."}]
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
MOOD = "{{ mood }}"
OWN = {
    "plain": PLAIN + "{% if add_generation_prompt %}assistant:{% endif %}",
    "parts": "{% for m in messages %}{% for p in m.content %}Q {{ p.text }} {% endfor %}{% endfor %}A" + MOOD,
    "base": None,
}
TEXTS = {"plain": "user: Name a colour.\nassistant:", "parts": "Q Name a colour. A"}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def key(site: Site, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> str:
    key = await site.tenant("speakers")
    folder = tmp_path_factory.mktemp("speaker")
    reference.make(Spec(seed=971, rank=8, targets=ATTENTION), folder)
    for name, template in OWN.items():
        files = {file: (folder / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE)}
        if template is not None:
            files["tokenizer_config.json"] = json.dumps({"chat_template": template}).encode()
        made = await site.admin.post(f"/admin/v1/tenants/speakers/adapters/{name}/versions", files=files)
        assert made.status_code == 201, made.text
    return key


async def post(site: Site, key: str, url: str, **body: Any) -> dict[str, Any]:
    said = await site.http.post(url, json=body, headers=bearer(key))
    assert said.status_code == 200, said.text
    return dict(said.json())


async def test_each_gets_its_own_prompt(site: Site, key: str) -> None:
    for name, text in TEXTS.items():
        tokens = await post(site, key, "/tokenize", model=name, messages=TURNS, add_special_tokens=False)
        back = await post(site, key, "/detokenize", tokens=tokens["tokens"])
        assert back["prompt"] == text
    ours = await post(site, key, "/tokenize", model="base", messages=TURNS)
    assert ours["tokens"] != tokens["tokens"]


@pytest.mark.parametrize("name", TEXTS)
async def test_a_chat_answers_as_the_text_of_its_prompt(site: Site, key: str, name: str) -> None:
    asked = {"model": name, "max_tokens": 8, "temperature": 0}
    text = await post(site, key, "/v1/completions", prompt=TEXTS[name], add_special_tokens=False, **asked)
    chat = await post(site, key, "/v1/chat/completions", messages=TURNS, **asked)
    assert chat["choices"][0]["message"]["content"] == text["choices"][0]["text"]
    message = await post(site, key, "/v1/messages", messages=TURNS, **asked)
    assert message["content"][0]["text"] == text["choices"][0]["text"]
    response = await post(
        site, key, "/v1/responses", model=name, input="Name a colour.", max_output_tokens=8, temperature=0
    )
    assert response["output"][-1]["content"][0]["text"] == text["choices"][0]["text"]
    counted = await post(site, key, "/v1/messages/count_tokens", model=name, messages=TURNS)
    assert counted["input_tokens"] == chat["usage"]["prompt_tokens"]


async def test_variables_reach_it_and_its_refusals_the_client(
    site: Site, key: str, reference: Reference, tmp_path: Path
) -> None:
    told = await post(
        site, key, "/tokenize", model="parts", messages=TURNS, chat_template_kwargs={"mood": " gladly"}
    )
    back = await post(site, key, "/detokenize", tokens=told["tokens"])
    assert back["prompt"].endswith("A gladly")
    body = {"model": "plain", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    strict = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    )
    strict += "{% endif %}{% endfor %}"
    reference.make(Spec(seed=972, rank=8, targets=ATTENTION), tmp_path)
    files = {file: (tmp_path / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE)}
    files["chat_template.jinja"] = strict.encode()
    made = await site.admin.post("/admin/v1/tenants/speakers/adapters/strict/versions", files=files)
    assert made.status_code == 201, made.text
    turns = [{"role": "system", "content": "s"}, *TURNS]
    refused = await site.http.post(
        "/v1/chat/completions", json=body | {"model": "strict", "messages": turns}, headers=bearer(key)
    )
    assert refused.status_code == 400, refused.text
    assert "no system" in refused.json()["error"]["message"]


async def test_the_bases_answers_stay_the_bases(site: Site, key: str) -> None:
    """Also while another template is at work."""
    base = site.services.engine.base.name
    tokens = await post(site, key, "/tokenize", model=base, messages=TURNS)
    assert "<|im_start|>" in (await post(site, key, "/detokenize", tokens=tokens["tokens"]))["prompt"]

"""Customers' chat templates in processes of their own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from server.engine.templates import TemplateFailed, Templates
from server.errors import BadRequest

TENANT = "acme"
TURNS = [{"role": "user", "content": "Hi"}]
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rooms() -> AsyncIterator[Templates]:
    """For all tests: each process takes two seconds to begin."""
    made = Templates()
    yield made
    await made.close()


@pytest_asyncio.fixture(loop_scope="module")
async def fresh() -> AsyncIterator[Templates]:
    made = Templates()
    yield made
    await made.close()


async def test_a_template_renders_as_transformers_does(rooms: Templates) -> None:
    assert await rooms.check(TENANT, PLAIN) == "string"
    assert await rooms.check(TENANT, PARTS) == "openai"
    text = await rooms.render(TENANT, PLAIN, TURNS, None, {"eos_token": "</s>"})
    assert text == "[user]Hi</s>"
    shown = "{{ tools | length }}{{ thinking }}{% if add_generation_prompt %}!{% endif %}"
    assert (
        await rooms.render(TENANT, shown, TURNS, [{}, {}], {"thinking": 1, "add_generation_prompt": True})
        == "21!"
    )


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "too long"),
        ("{{ 'x' * 10 ** 10 }}{{ messages[0].content }}", "memory"),
        ("{{ messages[0].content.__class__.__mro__ }}", "unsafe"),
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('only with a system prompt') }}", "only with a system prompt"),
        ("nothing of it", "does not write what a user says"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "deeply"),
    ],
)
async def test_one_that_cannot_be_used_says_why(rooms: Templates, template: str, words: str) -> None:
    with pytest.raises(TemplateFailed, match=words):
        await rooms.check(TENANT, template)
    assert await rooms.check(TENANT, PLAIN) == "string"


async def test_what_is_written_comes_as_it_is_and_is_bounded_in_bytes(rooms: Templates) -> None:
    """As JSON a sign of four bytes has twelve: a long text was longer than a line may be, and a 500."""
    for sign, count in (("\U0001f600", 1_500_000), ("\x01", 7_000_000)):
        turns = [{"role": "user", "content": sign}]
        text = await rooms.render(TENANT, f"{{{{ messages[0].content * {count} }}}}", turns, None, {})
        assert (len(text), text[0], text[-1]) == (count, sign, sign)
    with pytest.raises(BadRequest, match="more than"):
        await rooms.render(TENANT, "{{ messages[0].content * 5000000 }}", TURNS, None, {})
    with pytest.raises(BadRequest, match="half a surrogate pair"):
        await rooms.render(TENANT, r"{{ '\ud800' }}", TURNS, None, {})
    assert await rooms.render(TENANT, PLAIN, TURNS, None, {}) == "[user]Hi"


async def test_one_that_runs_away_leaves_the_other_room(rooms: Templates) -> None:
    await rooms.check(TENANT, PLAIN)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    running = asyncio.create_task(rooms.render("evil", endless, TURNS, None, {}))
    await asyncio.sleep(0)
    for _ in range(3):
        assert await rooms.render(TENANT, PLAIN, TURNS, None, {}) == "[user]Hi"
    with pytest.raises(BadRequest, match="own chat template"):
        await running


async def test_it_knows_no_secrets(fresh: Templates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_ADMIN_KEY", "secret")
    await fresh.check(TENANT, PLAIN)
    process = fresh._free[-1]._process
    assert process is not None
    environment = await asyncio.to_thread(open, f"/proc/{process.pid}/environ", "rb")
    with environment:
        assert b"secret" not in environment.read()


async def test_it_ends_with_the_server(fresh: Templates) -> None:
    await fresh.check(TENANT, PLAIN)
    process = fresh._free[-1]._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.close()
    async with asyncio.timeout(60):
        await process.wait()
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)

"""A wrong list costs its first wrong item, and what is valid is what vLLM's model says. No engine runs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import ValidationError

from server.engine import validation
from server.engine.serving import resolve
from server.engine.validation import validate, validate_in_turns
from server.inference.dialects.registry import ANSWERING, COUNTING

DIALECTS = {dialect.name: dialect for dialect in [*ANSWERING, *COUNTING]}
USER = {"role": "user", "content": "hi"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "ho"}]}
MANY = 300
LISTS = [("chat", "messages"), ("responses", "input"), ("messages", "messages")]


def model_of(name: str, body: dict[str, Any]) -> Any:
    return resolve(DIALECTS[name].request_model(body))


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("chat", {"messages": [USER, PARTS, USER], "stop": ["a", "b"], "temperature": 0.5}),
        ("chat", {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("completion", {"prompt": [1, 2, 3], "max_tokens": 5}),
        ("completion", {"prompt": [[1], [2, 3]]}),
        ("completion", {"prompt": ["a", "b"], "logit_bias": {"1": 2.0}}),
        ("responses", {"input": "hi"}),
        ("responses", {"input": [USER, {"role": "assistant", "content": "ho"}, USER]}),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}]}),
        ("messages", {"messages": [USER, PARTS], "max_tokens": 5}),
    ],
)
def test_what_is_valid_stays_what_it_is(name: str, body: dict[str, Any]) -> None:
    body |= {"model": "a"}
    model = model_of(name, body)
    ours, theirs = validate(model, body), model.model_validate(body)
    assert type(ours) is type(theirs)
    fresh = {"request_id", "created_at"}
    assert ours.model_dump(exclude=fresh) == theirs.model_dump(exclude=fresh)


@pytest.mark.parametrize("item", [{}, 1, None, [], "x", {"role": "user", "content": 5}, {"type": "nothing"}])
@pytest.mark.parametrize(
    ("name", "field"), [("chat", "messages"), ("responses", "input"), ("messages", "messages")]
)
def test_many_wrong_items_cost_as_much_as_one(name: str, field: str, item: Any) -> None:
    def errors(number: int) -> list[Any]:
        body = {"model": "a", "max_tokens": 5, field: [item] * number}
        if name == "responses":
            del body["max_tokens"]
        with pytest.raises(ValidationError) as refused:
            validate(model_of(name, body), body)
        return refused.value.errors(include_url=False, include_context=False)

    one, many = errors(1), errors(MANY)
    assert len(many) == len(one) < 500
    assert many[0]["loc"] == one[0]["loc"]


LONG = [
    ("chat", "messages", [USER, PARTS] * 400),
    ("chat", "messages", [{"role": "user", "content": [{"type": "text", "text": "x"}] * 900}] * 3),
    ("responses", "input", [USER, {"role": "assistant", "content": "ho"}] * 600),
    ("responses", "input", [{"type": "message", "role": "user", "content": "hi"}] * 600),
    ("messages", "messages", [USER, PARTS] * 400),
]


@pytest.mark.parametrize(("name", "field", "items"), LONG)
async def test_a_long_conversation_is_read_in_turns_and_is_the_same(
    name: str, field: str, items: list[Any]
) -> None:
    body = {"model": "a", field: items} | ({"max_tokens": 5} if name == "messages" else {})
    model = model_of(name, body)
    made = asyncio.create_task(validate_in_turns(model, body))
    turns = 0
    while not made.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 2
    fresh = {"request_id", "created_at"}
    assert made.result().model_dump(exclude=fresh) == validate(model, body).model_dump(exclude=fresh)


async def test_many_long_conversations_take_turns_with_each_other_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hundred of them would otherwise each read a piece before anybody else has a turn."""
    body = {"model": "a", "messages": [USER] * 500}
    model, calls = model_of("chat", body), [0]

    def counted(model: Any, body: Any) -> Any:
        calls[0] += 1
        return validate(model, body)

    monkeypatch.setattr(validation, "validate", counted)
    made = [asyncio.create_task(validate_in_turns(model, body)) for _ in range(10)]
    most = 0
    while not all(one.done() for one in made):
        before = calls[0]
        await asyncio.sleep(0)
        most = max(most, calls[0] - before)
    assert calls[0] == 10 * -(-500 // validation.PIECE)
    assert most == 1
    assert {len(one.result().messages) for one in made} == {500}


@pytest.mark.parametrize(("name", "field"), LISTS)
async def test_what_is_wrong_far_down_is_named_by_its_place(name: str, field: str) -> None:
    body = {"model": "a", field: [USER] * 700 + [{"role": "user", "content": 5}] + [USER] * 300}
    body |= {"max_tokens": 5} if name == "messages" else {}
    with pytest.raises(ValidationError) as refused:
        await validate_in_turns(model_of(name, body), body)
    assert 700 in refused.value.errors()[0]["loc"]

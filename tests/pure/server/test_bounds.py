"""How many items a field may have."""

from __future__ import annotations

from typing import Any

import pytest

from server.errors import BadRequest
from server.inference.bounds import MAX_ITEMS, MAX_MEMBERS, MAX_PARTS, PARTED, check_sizes

BIASES = {str(n): 1 for n in range(MAX_MEMBERS["logit_bias"])}
TURN = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": [TURN] * MAX_ITEMS["messages"], "tools": [{}] * MAX_ITEMS["tools"]},
        {"messages": [{"role": "user", "content": [{}] * MAX_PARTS}]},
        {
            "stop": ["x"] * MAX_ITEMS["stop"],
            "logit_bias": BIASES,
        },
        {"input": list(range(100_000)), "prompt": list(range(100_000))},
        {"input": ["x"] * MAX_ITEMS["input"]},
        {"messages": "no list", "tools": None, "stop": 5, "logit_bias": []},
    ],
)
def test_what_is_let_in(body: dict[str, Any]) -> None:
    check_sizes(body)


@pytest.mark.parametrize("name", MAX_ITEMS)
def test_too_many_items(name: str) -> None:
    with pytest.raises(BadRequest, match=f"{name} has more than {MAX_ITEMS[name]} items") as refused:
        check_sizes({name: [TURN] * (MAX_ITEMS[name] + 1)})
    assert refused.value.param == name


@pytest.mark.parametrize("name", MAX_MEMBERS)
def test_too_many_members(name: str) -> None:
    with pytest.raises(BadRequest, match=f"more than {MAX_MEMBERS[name]} members"):
        check_sizes({name: dict.fromkeys(map(str, range(MAX_MEMBERS[name] + 1)), 1)})


@pytest.mark.parametrize("name", ["messages", "input"])
def test_too_many_parts(name: str) -> None:
    with pytest.raises(BadRequest, match=rf"{name}.1.content has more than {MAX_PARTS} parts"):
        check_sizes({name: [TURN, {"role": "user", "content": [{}] * (MAX_PARTS + 1)}]})


@pytest.mark.parametrize("name", ["messages", "input"])
@pytest.mark.parametrize("member", PARTED)
def test_too_many_of_anything_in_one_turn(name: str, member: str) -> None:
    check_sizes({name: [{"role": "assistant", member: [{}] * MAX_PARTS}]})
    with pytest.raises(BadRequest, match=rf"{name}.0.{member} has more than {MAX_PARTS} parts"):
        check_sizes({name: [{"role": "assistant", member: [{}] * (MAX_PARTS + 1)}]})


def test_too_many_parts_within_a_part() -> None:
    result = {"type": "tool_result", "content": [{}] * (MAX_PARTS // 2)}
    check_sizes({"messages": [{"role": "user", "content": [result]}]})
    with pytest.raises(BadRequest, match=r"messages.0.content has more than"):
        check_sizes({"messages": [{"role": "user", "content": [result, result]}]})


@pytest.mark.parametrize("item", [1, "x", None, [], True])
@pytest.mark.parametrize("name", ["messages", "tools"])
def test_items_that_are_no_objects(name: str, item: Any) -> None:
    with pytest.raises(BadRequest) as refused:
        check_sizes({name: [TURN, item]})
    assert refused.value.param == f"{name}.1"

"""Tools, and the items and blocks of earlier turns: what is read of them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from server.errors import BadRequest
from server.inference.dialects.registry import DIALECTS
from tests.pure.server.test_fields import LEAST

FUNCTIONS = [{"type": "function", "function": {"name": name}} for name in ("a", "b", "c")]


def choosing(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


# Of a tool without parameters that has to be called.
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


def test_the_model_is_offered_the_tools_that_are_allowed() -> None:
    asked = {**LEAST["chat"], "tools": FUNCTIONS}
    kept = DIALECTS["chat"].allowed_fields(asked | {"tool_choice": choosing("auto", "a", "c")})
    assert ([tool["function"]["name"] for tool in kept["tools"]], kept["tool_choice"]) == (["a", "c"], "auto")
    kept = DIALECTS["chat"].allowed_fields(asked | {"tool_choice": choosing("required", "b")})
    assert kept["tool_choice"] == "required"
    assert kept["tools"] == [
        {"type": "function", "function": {"name": "b", "parameters": NOTHING, "strict": True}}
    ]
    number = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": 5}}
    wrong = choosing("any", "a"), choosing("auto", "d"), choosing("auto"), {"type": "allowed_tools"}, number
    for choice in wrong:
        with pytest.raises(BadRequest, match=r"tool_choice\.allowed_tools"):
            DIALECTS["chat"].allowed_fields(asked | {"tool_choice": choice})


def test_responses_choose_among_tools_too() -> None:
    tools = [{"type": "function", "name": name, "parameters": {}} for name in ("a", "b", "c")]
    asked = {**LEAST["responses"], "tools": tools}
    some = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "b"}]}
    kept = DIALECTS["responses"].allowed_fields(asked | {"tool_choice": some})
    assert kept["tool_choice"] == "required"
    assert kept["tools"] == [{**tools[1], "parameters": NOTHING, "strict": True}]
    for wrong, param in (
        (some | {"mode": "any"}, "tool_choice"),
        (some | {"tools": [{"type": "function", "name": "d"}]}, "tool_choice.tools"),
        ({"type": "web_search_preview"}, "tool_choice.type"),
        ({"type": "mcp", "server_label": "x"}, "tool_choice.type"),
    ):
        with pytest.raises(BadRequest) as refused:
            DIALECTS["responses"].allowed_fields(asked | {"tool_choice": wrong})
        assert refused.value.param == param


@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_custom_tools_say_what_to_offer_instead(kind: str) -> None:
    tool = {"type": "custom", "name": "f", "custom": {"name": "f"}}
    with pytest.raises(BadRequest, match="whose only parameter is a string") as refused:
        DIALECTS[kind].allowed_fields({**LEAST[kind], "tools": [tool]})
    assert refused.value.param == "tools.0.type"


def test_an_earlier_answer_needs_no_id() -> None:
    """As Vercel's SDK sends it, and people who write it by hand."""
    answer = {"role": "assistant", "content": [{"type": "output_text", "text": "x"}], "id": None}
    asked = [answer, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]
    kept = DIALECTS["responses"].allowed_fields({"input": asked})["input"]
    assert kept[1:] == asked[1:]
    assert kept[0] == {
        "type": "message",
        "id": "msg_0",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "x", "annotations": []}],
    }
    own = kept[0] | {"id": "msg_abc", "status": "incomplete"}
    assert DIALECTS["responses"].allowed_fields({"input": [own]})["input"] == [own]


def test_of_an_earlier_answer_no_part_is_lost() -> None:
    """vLLM reads the first one alone, and none of a refusal or of an empty answer."""
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "a", "annotations": 5}]}
    said["content"] += [{"type": "input_text", "text": "b"}]  # type: ignore[operator]
    no = {
        "type": "message",
        "id": "m",
        "role": "assistant",
        "content": [{"type": "refusal", "refusal": "no"}],
    }
    nothing = {"type": "message", "id": "m", "role": "assistant", "content": []}
    parts = [{"type": "reasoning_text", "text": text} for text in "cd"]
    thought = {"type": "reasoning", "id": None, "content": parts}
    kept = DIALECTS["responses"].allowed_fields({"input": [said, no, nothing, thought]})["input"]
    assert [item["content"] for item in kept] == [
        [{"type": "output_text", "text": "a\nb", "annotations": []}],
        [{"type": "output_text", "text": "no", "annotations": []}],
        "",
        [{"type": "reasoning_text", "text": "c\nd"}],
    ]
    assert (kept[1]["id"], kept[3]["id"], kept[3]["summary"]) == ("m", "rs_3", [])


@pytest.mark.parametrize(
    ("item", "code", "reason"),
    [
        ({"type": "item_reference", "id": "msg_1"}, "stateless", "send the item itself"),
        ({"type": "web_search_call", "id": "ws_1"}, "invalid_request", "only messages"),
        ({"type": "x" * 5000}, "invalid_request", "only messages"),
    ],
)
def test_items_that_only_their_vendor_has_a_use_for(item: dict[str, Any], code: str, reason: str) -> None:
    with pytest.raises(BadRequest, match=reason) as refused:
        DIALECTS["responses"].allowed_fields({"input": [{"role": "user", "content": "x"}, item]})
    assert (refused.value.code, refused.value.param) == (code, "input.1.type")
    assert len(refused.value.message) < 300


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({}, "role"),
        ({"content": "a"}, "role"),
        ({"role": "tool", "content": "a"}, "role"),
        ({"role": 5, "content": "a"}, "role"),
        ({"role": ["user"], "content": "a"}, "role"),
        ({"type": "message", "content": "a"}, "role"),
        ({"type": None, "content": "a"}, "role"),
        ({"role": "user"}, "content"),
        ({"role": "assistant", "content": None}, "content"),
        ({"role": "user", "content": {"type": "input_text", "text": "a"}}, "content"),
        ({"role": "user", "content": [{"text": "a"}]}, "content.0.type"),
        (
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "text"}]},
            "content.1.type",
        ),
        ({"role": "system", "content": [{"type": "input_audio", "input_audio": {}}]}, "content.0.type"),
    ],
)
def test_a_turn_that_is_none_is_told_what_it_lacks(item: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest, match="must be") as refused:
        DIALECTS["responses"].allowed_fields({"input": [{"role": "user", "content": "x"}, item]})
    assert refused.value.param == f"input.1.{param}"


def test_a_type_that_is_null_is_none() -> None:
    turns: list[Any] = [{"type": None, "role": role, "content": "a"} for role in ("user", "assistant")]
    kept = DIALECTS["responses"].allowed_fields({"input": turns})["input"]
    assert kept == [{"role": role, "content": "a"} for role in ("user", "assistant")]


@pytest.mark.parametrize("kind", ["messages", "count_tokens"])
@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("document", "send its text"),
        ("search_result", "send its text"),
        ("server_tool_use", "no tool runs here"),
        ("web_search_tool_result", "no tool runs here"),
    ],
)
def test_blocks_that_only_their_vendor_reads(kind: str, block: str, reason: str) -> None:
    turn = {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": block}]}
    with pytest.raises(BadRequest, match=reason) as refused:
        DIALECTS[kind].allowed_fields({**LEAST[kind], "messages": [turn]})
    assert (refused.value.code, refused.value.param) == (
        "unsupported_parameter",
        "messages.0.content.1.type",
    )
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "x"}]}
    turns: list[Any] = [{"role": "user", "content": [result]}]
    assert DIALECTS[kind].allowed_fields({**LEAST[kind], "messages": turns})["messages"] == turns
    turns = [{"role": "user", "content": [{**result, "content": [{"type": block}]}]}]
    with pytest.raises(BadRequest, match=reason) as refused:
        DIALECTS[kind].allowed_fields({**LEAST[kind], "messages": turns})
    assert refused.value.param == "messages.0.content.0.content.0.type"


@pytest.mark.parametrize("part", ["x", None, {}, {"type": "odd"}, {"type": 5}])
def test_of_a_tools_result_nothing_is_passed_over(part: Any) -> None:
    """vLLM reads texts and images of it, and goes on without a word where there is something else."""
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "x"}, part]}
    with pytest.raises(BadRequest, match="has blocks of text") as refused:
        DIALECTS["messages"].allowed_fields(
            {"messages": [{"role": "user", "content": [result]}], "max_tokens": 5}
        )
    assert refused.value.param == "messages.0.content.0.content.1.type"


@pytest.mark.parametrize("choice", ["auto", "none", None])
def test_no_tools_are_no_tools(choice: str | None) -> None:
    kept = DIALECTS["chat"].allowed_fields({**LEAST["chat"], "tools": [], "tool_choice": choice})
    assert kept == DIALECTS["chat"].allowed_fields(LEAST["chat"])


@pytest.mark.parametrize(
    ("kind", "tool"),
    [
        ("messages", {"type": "web_search_20250305", "name": "web_search"}),
        ("count_tokens", {"type": "bash_20250124", "name": "bash"}),
        ("responses", {"type": "mcp", "server_label": "x"}),
        ("chat", {"type": "web_search"}),
    ],
)
def test_tools_that_the_vendor_runs(kind: str, tool: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="no tool runs here") as refused:
        DIALECTS[kind].allowed_fields({**LEAST[kind], "tools": [tool]})
    assert refused.value.param == "tools.0.type"

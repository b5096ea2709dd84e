"""What the earlier turns of a conversation may hold, in responses and in messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.errors import BadRequest

# Items of a response's input that vLLM makes turns of; what has a role is one.
_ITEMS = frozenset(
    {
        "message", "function_call", "function_call_output", "reasoning", "custom_tool_call",
        "custom_tool_call_output",
    }
)  # fmt: skip
_ROLES = ("user", "assistant", "system", "developer")
_PARTS = ("input_text", "input_image", "input_file")
_SAID = {"output_text": "text", "input_text": "text", "refusal": "refusal"}
_AS_TEXT = "send its text as a block of the type text"
_NO_TOOL = "no tool runs here; leave it out, or offer a tool of your own"
# Anthropic's blocks that vLLM does not read.
_NO_BLOCKS: Mapping[str, str] = {
    "container_upload": "there are no containers; send its text",
    "document": _AS_TEXT,
    "mcp_tool_use": _NO_TOOL,
    "search_result": _AS_TEXT,
    "server_tool_use": _NO_TOOL,
}
_OF_A_RESULT = frozenset({"image", "text", "tool_reference"})
_OF_ITS_VENDOR = "_tool_result"  # as in web_search_tool_result


def whole_input(items: list[Any]) -> list[Any]:
    """Items of a response's input as vLLM reads them; BadRequest for those that it has no use for.

    vLLM reads an earlier answer only with the ids and states that clients leave out, and of its texts the
    first one alone, as it does of what a model has thought.
    """
    return [_whole(number, item) for number, item in enumerate(items)]


def _whole(number: int, item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    _check_item(number, item)
    if item.get("type", "") is None:
        item = {name: value for name, value in item.items() if name != "type"}
    if item.get("type", "message") == "message":
        _check_message(f"input.{number}", item)
    if item.get("role") == "assistant":
        return _whole_answer(number, item)
    if item.get("type") == "reasoning":
        return _whole_reasoning(number, item)
    return item


def _check_item(number: int, item: Mapping[str, Any]) -> None:
    kind, param = item.get("type"), f"input.{number}.type"
    if kind == "item_reference":
        cure = "Responses are not kept; send the item itself"
        raise BadRequest(f"{cure} instead of an item_reference.", code="stateless", param=param)
    if isinstance(kind, str) and kind not in _ITEMS:
        raise BadRequest(
            f"{param}: items of the type {kind[:64]} are not served, only messages, calls of functions, their"
            " outputs, and reasoning. Leave it out.",
            param=param,
        )


def _check_message(where: str, item: Mapping[str, Any]) -> None:
    """BadRequest for a turn that is none: vLLM finds the id missing that another kind of item would need."""
    role, content = item.get("role"), item.get("content")
    if role not in _ROLES:
        raise BadRequest(
            f"{where}.role must be one of {', '.join(_ROLES)}; what a function gave is an item of the type"
            " function_call_output.",
            param=f"{where}.role",
        )
    if not isinstance(content, str | list):
        raise BadRequest(f"{where}.content must be a text, or a list of parts.", param=f"{where}.content")
    for place, part in enumerate(content if role != "assistant" and isinstance(content, list) else ()):
        if isinstance(part, dict) and part.get("type") not in _PARTS:
            param = f"{where}.content.{place}.type"
            raise BadRequest(f"{param} must be one of {', '.join(_PARTS)}.", param=param)


def _whole_answer(number: int, item: Mapping[str, Any]) -> Any:
    parts = item.get("content")
    if parts == []:
        return {"role": "assistant", "content": ""}
    texts = _texts(parts, _SAID)
    if not texts or not isinstance(parts, list):
        return item
    kept = {name: value for name, value in item.items() if value is not None}
    one: dict[str, Any] = {"type": "output_text", "text": "\n".join(texts), "annotations": []}
    if len(parts) == 1 and parts[0]["type"] == "output_text":
        one = parts[0] | {"annotations": parts[0].get("annotations") or []}
    return {"type": "message", "id": f"msg_{number}", "status": "completed"} | kept | {"content": [one]}


def _whole_reasoning(number: int, item: Mapping[str, Any]) -> Any:
    whole: dict[str, Any] = {"id": f"rs_{number}", "summary": []}
    whole |= {name: value for name, value in item.items() if value is not None}
    for name, kind in (("content", "reasoning_text"), ("summary", "summary_text")):
        texts = _texts(item.get(name), {kind: "text"})
        if texts is not None and len(texts) > 1:
            whole[name] = [{"type": kind, "text": "\n".join(texts)}]
    return whole


def _texts(parts: Any, names: Mapping[str, str]) -> list[str] | None:
    """The texts of these parts; None where one is something else."""
    found = []
    for part in parts if isinstance(parts, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(names[kind]) if isinstance(kind, str) and kind in names else None
        if not isinstance(text, str):
            return None
        found.append(text)
    return found if isinstance(parts, list) else None


def check_blocks(messages: Any) -> None:
    """BadRequest, with what to do, for a block of Anthropic's that vLLM does not read.

    Of a tool's result vLLM reads texts, images and references, and passes over all else.
    """
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for place, block in enumerate(content if isinstance(content, list) else ()):
            if not isinstance(block, dict):
                continue
            where = f"messages.{number}.content.{place}"
            _check_block(where, block.get("type"))
            inner = block.get("content") if block.get("type") == "tool_result" else None
            for at, part in enumerate(inner if isinstance(inner, list) else ()):
                kind = part.get("type") if isinstance(part, dict) else None
                _check_block(f"{where}.content.{at}", kind)
                if not isinstance(kind, str) or kind not in _OF_A_RESULT:
                    param = f"{where}.content.{at}.type"
                    raise BadRequest(f"{param}: a tool's result has blocks of text, and images", param=param)


def _check_block(where: str, kind: Any) -> None:
    if not isinstance(kind, str) or kind == "tool_result":
        return
    cure = _NO_BLOCKS.get(kind, _NO_TOOL if kind.endswith(_OF_ITS_VENDOR) else None)
    if cure is not None:
        told = f"{where}.type: blocks of the type {kind[:64]} are not served: {cure}."
        raise BadRequest(told, code="unsupported_parameter", param=f"{where}.type")

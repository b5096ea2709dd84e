"""Which tools a request may offer, and which of them it lets the model call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.errors import BadRequest
from server.inference.dialects.arguments import held_arguments

_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def check_own_tools(tools: Any, kinds: Sequence[str]) -> None:
    """BadRequest for a tool that is none of ``kinds``: its vendor runs it, and nothing runs here.

    OpenAI's custom tools, which a model calls with any text, are not served. Neither is a tool whose
    arguments can be no object: a call's are one in each of the APIs.
    """
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        _check_arguments(index, tool)
        kind = tool.get("type", kinds[0]) if isinstance(tool, dict) else kinds[0]
        if kind is not None and kind not in kinds:
            why = "no tool runs here. Offer one of your own."
            if kind == "custom":
                why = "offer a function whose only parameter is a string."
            raise BadRequest(
                f"Only tools of the type {kinds[0]} are served: {why}", param=f"tools.{index}.type"
            )


def _check_arguments(index: int, tool: Any) -> None:
    path, schema = _schema_of(tool)
    if isinstance(schema, dict) and held_arguments(schema) is None:
        where = f"tools.{index}.{path}"
        raise BadRequest(
            f"{where} has to be the schema of an object, since the arguments of a call are one."
            ' Send {"type": "object", "properties": {…}}.',
            param=where,
        )


def _schema_of(tool: Any) -> tuple[str, Any]:
    """Where within ``tool`` the schema of its arguments is, and the schema."""
    if not isinstance(tool, dict):
        return "parameters", None
    if isinstance(inner := tool.get("function"), dict):  # chat; responses and messages have it at the top
        return "function.parameters", inner.get("parameters")
    name = "input_schema" if "input_schema" in tool else "parameters"
    return name, tool.get(name)


def with_strict_tools(tools: Any, forced: bool) -> Any:
    """``tools``, whose calls' arguments fit their schemas where a tool is ``strict`` or a call is ``forced``.

    vLLM lets them be any JSON, a bare text too, without ``strict``, and where there are no parameters.
    """
    if not isinstance(tools, list):
        return tools
    return [_strict(tool) if forced or _asks_strict(tool) else tool for tool in tools]


def _asks_strict(tool: Any) -> bool:
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    return isinstance(inner, dict) and inner.get("strict") is True


def _strict(tool: Any) -> Any:
    if not isinstance(tool, dict):
        return tool
    if isinstance(inner := tool.get("function"), dict):
        return tool | {"function": _with_object(inner) | {"strict": True}}
    return _with_object(tool) | {"strict": True}


def _with_object(function: dict[str, Any]) -> dict[str, Any]:
    """With parameters that are an object: none at all where it has none, as OpenAI's API takes it.

    vLLM itself does so for Anthropic's ``input_schema``.
    """
    name = "input_schema" if "input_schema" in function else "parameters"
    schema = function.get(name)
    if name == "parameters" and schema in (None, {}):
        return function | {name: _NO_PARAMETERS}
    return function | {name: held_arguments(schema)} if isinstance(schema, dict) else function


def with_allowed_tools(body: dict[str, Any], *, nested: bool) -> dict[str, Any]:
    """A request whose ``tool_choice`` is one that vLLM knows.

    OpenAI's ``allowed_tools`` leaves some of the tools to the model: here it is offered those alone. Chat has
    them ``nested`` in an object of that name, responses have not. Without tools a choice between them asks
    for nothing. BadRequest for a choice of tools that are not there, and for a function without a name, which
    vLLM takes for granted where a choice names one.
    """
    choice, tools = body.get("tool_choice"), body.get("tools")
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        if isinstance(tool, dict) and _name(tool) is None:
            where = f"tools.{index}.function.name" if nested else f"tools.{index}.name"
            raise BadRequest(f"{where}: a function needs a name, which is a string", param=where)
    if tools == []:
        body = {name: value for name, value in body.items() if name != "tools"}
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        where = "tool_choice.allowed_tools" if nested else "tool_choice"
        return _allowed(body, choice.get("allowed_tools") if nested else choice, where)
    if not tools and choice in ("auto", "none"):
        return {name: value for name, value in body.items() if name != "tool_choice"}
    return body


def check_own_choice(choice: Any) -> None:
    """BadRequest for a choice of a tool that its vendor runs."""
    if isinstance(choice, dict) and choice.get("type") not in ("function", "allowed_tools"):
        raise BadRequest(
            "Only tools of the type function are served: no tool runs here. Choose one of your own.",
            param="tool_choice.type",
        )


def _allowed(body: dict[str, Any], allowed: Any, where: str) -> dict[str, Any]:
    if not isinstance(allowed, dict) or allowed.get("mode") not in ("auto", "required"):
        raise BadRequest(f"{where} needs a mode, auto or required, and tools", param=where)
    listed = allowed.get("tools")
    named = {_name(tool) for tool in (listed if isinstance(listed, list) else ())} - {None}
    tools = body.get("tools")
    kept = [tool for tool in tools if _name(tool) in named] if isinstance(tools, list) else []
    if not kept or len({_name(tool) for tool in kept}) != len(named):
        raise BadRequest(f"{where}.tools names a tool that is not among tools", param=f"{where}.tools")
    return body | {"tools": kept, "tool_choice": allowed["mode"]}


def _name(tool: Any) -> str | None:
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else None

"""No boolean or number inside a field of vLLM's requests is left to pydantic, which reads texts as such."""

from __future__ import annotations

import importlib
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from server.inference.dialects.nested import BOOLEANS, INTEGERS
from server.inference.dialects.registry import DIALECTS

# Items of a response's input, and tools, that are refused whatever they hold; an answer that was given
# before, of which the texts are read alone; and numbers of which another check takes care.
ELSEWHERE = (
    "allowed_token_ids.",
    "documents.",
    "logit_bias.",
    "logprob_token_ids.",
    "prompt.",
    "queries.",
    "stop_token_ids.",
    "tokens.",
    "input.",
    "repetition_detection.",
    "stream_options.continuous_usage_stats",
    "messages.*.content.*.audio_embeds",
    "messages.*.content.*.image_embeds",
    "messages.*.content.*.video_embeds",
)
REFUSED_TOOLS = (
    "allowed_tools.",
    "display_",
    "external_web_access",
    "filters.",
    "frame_",
    "max_num_results",
    "output_compression",
    "partial_images",
    "ranking_options.",
    "require_approval.",
    "tools.",
)


def leaves(form: Any, path: str, above: tuple[Any, ...] = ()) -> Iterator[str]:
    """Where ``form``, a type, holds a boolean or a number."""
    origin, inner = typing.get_origin(form), typing.get_args(form)
    if form in (bool, int, float):
        yield path
    elif origin in (typing.Annotated, typing.Required, typing.NotRequired):
        yield from leaves(inner[0], path, above)
    elif origin in (typing.Union, types.UnionType):
        for one in inner:
            yield from leaves(one, path, above)
    elif origin is dict:
        yield from leaves(inner[1], f"{path}.{{}}", above)
    elif isinstance(origin, type) and issubclass(origin, Iterable):
        yield from leaves(inner[0], f"{path}.*", above)
    elif isinstance(form, type) and form not in above:
        for name, one in members(form).items():
            yield from leaves(one, f"{path}.{name}", (*above, form))


def members(form: type) -> dict[str, Any]:
    if issubclass(form, BaseModel):
        return {field.alias or name: field.annotation for name, field in form.model_fields.items()}
    return typing.get_type_hints(form) if typing.is_typeddict(form) or issubclass(form, dict) else {}


def is_elsewhere(path: str) -> bool:
    tool = path.removeprefix("tools.*.")
    return path.startswith(ELSEWHERE) or (tool != path and tool.startswith(REFUSED_TOOLS))


@pytest.mark.parametrize("kind", sorted(DIALECTS))
def test_each_boolean_and_number_inside_a_field_is_looked_at(kind: str) -> None:
    dialect = DIALECTS[kind]
    found: set[str] = set()
    for body in ({"prompt": "x"}, {"messages": []}):
        module, name = dialect.request_model(body).split(":")
        model = getattr(importlib.import_module(module), name)
        for field, form in members(model).items():
            if field in dialect.accepted:
                found |= {path for path in leaves(form, field) if "." in path}
    missing = {path for path in found if not is_elsewhere(path)} - {*BOOLEANS, *INTEGERS}
    assert not missing, "vLLM's requests have more than the list knows"
    if kind in ("chat", "messages"):
        assert "tools.*.defer_loading" in found

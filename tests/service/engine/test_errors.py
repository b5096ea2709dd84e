"""Whose fault it is where reading a request fails: the client's, or a defect of this server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.v1.worker.gpu.sample.logit_bias import MAX_NUM_STOP_TOKEN_IDS

from adapters.inspection import chat_files
from server.engine import MAX_STOPS, validation
from server.engine.errors import parse_errors
from server.errors import BadRequest

BODY = {"model": "a", "messages": [{"role": "user", "content": "Hi"}]}
TRIPS: list[tuple[type[Exception], Callable[[Any], Any]]] = [
    (AttributeError, lambda value: value.no_such_name),
    (IndexError, lambda value: [][0]),
    (KeyError, lambda value: {}["messages"]),
]


def in_package(name: str, code: str) -> Any:
    """``f`` as ``code`` defines it, in a module of this name."""
    module: dict[str, Any] = {"__name__": name}
    exec(code, module)
    return module["f"]


@pytest.mark.parametrize("wrong", [1, "a", [1], [{}]])
def test_what_vllm_trips_over_is_a_bad_request(wrong: Any) -> None:
    """It asks ``structured_outputs`` for fields before it looks whether that is an object."""
    with pytest.raises(BadRequest, match="another type") as told:
        validation.parsed(ChatCompletionRequest, BODY | {"structured_outputs": wrong}, 100)
    assert isinstance(told.value.__cause__, AttributeError)


@pytest.mark.parametrize(
    ("model", "body", "name"),
    [
        (ChatCompletionRequest, BODY, "stop"),
        (AnthropicMessagesRequest, {**BODY, "max_tokens": 5}, "stop_sequences"),
    ],
)
def test_vllm_takes_as_many_stop_texts_as_are_promised(
    model: type[BaseModel], body: dict[str, Any], name: str
) -> None:
    """Anthropic's clients send more than the four of OpenAI's, which are vLLM's bound by itself."""
    stops = [str(number) for number in range(MAX_STOPS)]
    assert getattr(validation.parsed(model, {**body, name: stops}, 100), name) == stops
    assert validation.parsed(ChatCompletionRequest, {**BODY, "stop": stops}, 100).stop == stops


@pytest.mark.parametrize("base_stops", [1, 29, 200])
def test_what_ends_an_answer_has_room_in_vllm_s_second_runner(base_stops: int) -> None:
    """Its own bound, on the request's and the base's together, ends its step, and the engine."""
    room = max(0, MAX_NUM_STOP_TOKEN_IDS - 1 - base_stops)
    body = BODY | {"min_tokens": 1, "stop_token_ids": list(range(room))}
    if base_stops < MAX_NUM_STOP_TOKEN_IDS:
        found = validation.parsed(ChatCompletionRequest, body, 200, base_stops)
        assert len(found.stop_token_ids) + base_stops < MAX_NUM_STOP_TOKEN_IDS
    body["stop_token_ids"] = list(range(room + 1))
    with pytest.raises(BadRequest, match=f"min_tokens: at most {room} ") as told:
        validation.parsed(ChatCompletionRequest, body, 200, base_stops)
    assert told.value.param == "min_tokens"


def test_an_adapter_s_own_ends_leave_room_for_min_tokens() -> None:
    assert 2 * chat_files.MAX_STOPS <= MAX_NUM_STOP_TOKEN_IDS


def test_a_field_that_vllm_misses_is_named() -> None:
    with pytest.raises(BadRequest, match="A field `messages` is missing"), parse_errors():
        in_package("vllm.reads", "def f(body): return body['messages']")({})


def test_what_python_trips_over_for_vllm_is_a_bad_request() -> None:
    with pytest.raises(BadRequest, match="another type"), parse_errors():
        in_package("vllm.reads", "import string\ndef f(one): return string.capwords(one)")(1)


@pytest.mark.parametrize(("kind", "trips"), TRIPS)
async def test_what_this_server_trips_over_is_no_bad_request(
    kind: type[Exception], trips: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised as it is: the middleware logs its traceback and answers 500."""
    monkeypatch.setattr(validation, "_is_long", trips)
    with pytest.raises(kind):
        await validation.parsed_in_turns(ChatCompletionRequest, BODY, 100)


@pytest.mark.parametrize(("kind", "trips"), TRIPS)
def test_nor_what_vllm_has_called_of_it(kind: type[Exception], trips: Callable[[Any], Any]) -> None:
    with pytest.raises(kind), parse_errors():
        in_package("vllm.calls", "def f(back): return back(1)")(trips)

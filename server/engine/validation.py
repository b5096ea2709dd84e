"""vLLM's request models, checked so that a wrong list costs its first wrong item and not all of them.

pydantic reports every error, of every member of a union: 2,000 empty objects as the input of
``/v1/responses`` give 466,000 errors in 12 seconds of the event loop, and memory in proportion. With
``fail_fast`` on each list the same takes a millisecond; what is valid is the same, and so is the first error.
"""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError, SchemaValidator

from server.engine.errors import parse_errors
from server.errors import BadRequest

CONVERSATIONS = ("messages", "input")
NEEDED = ("model", "max_tokens")  # by some model that has a conversation
PIECE = 64
_PARTED = ("content", "tool_calls", "summary", "output")
# One piece in each turn of the event loop, however many bodies there are.
_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()
# vLLM's second runner has room for 1,024, and for 128 that end an answer, of which one is left free.
MAX_ALLOWED, MAX_STOPS_LATER = 1024, 127
_LISTS = ("list", "tuple", "set", "frozenset")


def validate(model: type[BaseModel], body: dict[str, Any]) -> Any:
    """``model.model_validate(body)``, except that each list stops at its first error."""
    return _validator(model).validate_python(body)


async def validate_in_turns(model: type[BaseModel], body: dict[str, Any]) -> Any:
    """As ``validate``, with a turn for everybody else after each few dozen items of a conversation.

    2,000 turns of ``/v1/responses`` take 150 ms. A thread would not help, since pydantic keeps Python's lock.
    Bodies take turns with each other, too.
    """
    name = next((name for name in CONVERSATIONS if _is_long(body.get(name))), None)
    if name is None:
        return validate(model, body)
    pieces = _pieces(body[name])
    request = await _in_turn(model, body | {name: pieces[0]})
    needed = {field: body[field] for field in NEEDED if field in body}
    items, done = list(getattr(request, name)), len(pieces[0])
    for piece in pieces[1:]:
        try:
            items += getattr(await _in_turn(model, needed | {name: piece}), name)
        except ValidationError as exc:
            raise _moved(exc, done) from exc
        done += len(piece)
    setattr(request, name, items)
    return request


async def _in_turn(model: type[BaseModel], body: dict[str, Any]) -> Any:
    async with _turns.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
        await asyncio.sleep(0)
        return validate(model, body)


def _is_long(value: Any) -> bool:
    return (
        isinstance(value, list) and isinstance(value[0] if value else None, dict) and _weight(value) > PIECE
    )


def _weight(items: list[Any]) -> int:
    """Items and what is in their lists: parts, calls, summaries."""
    lists = (item.get(member) for item in items if isinstance(item, dict) for member in _PARTED)
    return len(items) + sum(len(parts) for parts in lists if isinstance(parts, list))


def _pieces(items: list[Any]) -> list[list[Any]]:
    """``items`` in lists of about ``PIECE`` by weight."""
    pieces: list[list[Any]] = [[]]
    weight = 0
    for item in items:
        if weight >= PIECE:
            pieces.append([])
            weight = 0
        pieces[-1].append(item)
        weight += _weight([item])
    return pieces


def _moved(exc: ValidationError, by: int) -> ValidationError:
    """``exc``'s first error about an item, which is so many places further on."""
    errors = exc.errors(include_url=False, include_context=False, include_input=False)
    first = next((one for one in errors if any(isinstance(part, int) for part in one["loc"])), errors[0])
    at = next((at for at, part in enumerate(first["loc"]) if isinstance(part, int)), None)
    moved = tuple(part + by if place == at else part for place, part in enumerate(first["loc"]))  # type: ignore[operator]
    error = PydanticCustomError("invalid", "{message}", {"message": first["msg"]})
    return ValidationError.from_exception_data(exc.title, [{"type": error, "loc": moved, "input": None}])


def check_token_ids(request: Any, vocabulary: int, base_stops: int = 0) -> None:
    """BadRequest for ids beyond the vocabulary, with which vLLM's core would read beside its logits; and for
    more than its second runner has room for, with which that would end its step, and the engine.

    ``base_stops`` is how many tokens end the base's answers. The adapter's own are in the request already.
    """
    for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
        if not all(0 <= token < vocabulary for token in getattr(request, name, None) or ()):
            raise BadRequest(f"{name}: token ids go from 0 to {vocabulary - 1}", param=name)
    if len(getattr(request, "allowed_token_ids", None) or ()) > MAX_ALLOWED:
        raise BadRequest(
            f"allowed_token_ids: at most {MAX_ALLOWED}; forbid the others with logit_bias, or send a grammar",
            param="allowed_token_ids",
        )
    stops = len(getattr(request, "stop_token_ids", None) or ())
    room = max(0, MAX_STOPS_LATER - base_stops)
    if stops + base_stops > MAX_STOPS_LATER and getattr(request, "min_tokens", None):
        raise BadRequest(
            f"min_tokens: at most {room} stop_token_ids beside it, the adapter's own among them; these are"
            f" {stops}",
            param="min_tokens",
        )


def parsed(model: type[BaseModel], body: dict[str, Any], vocabulary: int, base_stops: int = 0) -> Any:
    """``body`` as ``model``. Raises BadRequest naming the field that is wrong."""
    with parse_errors():
        request = validate(model, body)
    check_token_ids(request, vocabulary, base_stops)
    return request


async def parsed_in_turns(
    model: type[BaseModel], body: dict[str, Any], vocabulary: int, base_stops: int = 0
) -> Any:
    """As ``parsed``, for a body of any size: others have their turns in between."""
    with parse_errors():
        request = await validate_in_turns(model, body)
    check_token_ids(request, vocabulary, base_stops)
    return request


def resumable(request: Any) -> bool:
    """Whether ``request`` may be paused, by what is cheap to see."""
    formatted = getattr(request, "response_format", None)
    formatted = formatted or getattr(getattr(request, "text", None), "format", None)
    chooses = getattr(request, "tools", None) and request.tool_choice != "none"
    return bool(
        (getattr(request, "n", None) or 1) == 1
        and (formatted is None or formatted.type == "text")
        and getattr(request, "output_config", None) is None
        and getattr(request, "structured_outputs", None) is None
        and getattr(request, "thinking_token_budget", None) is None
        and not getattr(request, "bad_words", None)
        and not chooses
        and not getattr(request, "presence_penalty", None)
        and not getattr(request, "frequency_penalty", None)
        and (getattr(request, "seed", None) is None or request.temperature == 0)
    )


@cache
def _validator(model: type[BaseModel]) -> SchemaValidator:
    return SchemaValidator(_failing_fast(model.__pydantic_core_schema__))


def _failing_fast(schema: Any) -> Any:
    """A copy of a core schema, or of a part of it, with ``fail_fast`` on every kind of list."""
    if isinstance(schema, dict):
        kind = schema.get("type")
        if not isinstance(kind, str):  # fields by name, one of which may be called "type"
            return {name: _failing_fast(part) for name, part in schema.items()}
        # Metadata is for JSON schemas, and may hold anything.
        made = {name: part if name == "metadata" else _failing_fast(part) for name, part in schema.items()}
        return made | {"fail_fast": True} if kind in _LISTS else made
    if isinstance(schema, list | tuple):
        return type(schema)(_failing_fast(part) for part in schema)
    return schema

"""What the checks of the libraries share; in an environment that has the libraries alone."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

URL, KEY, NARROW_KEY, MODEL = (os.environ[name] for name in ("URL", "KEY", "NARROW_KEY", "MODEL"))
BASE = f"{URL}/v1"
# A call in the form of the demo's base has forty tokens.
TOKENS = 80
# Tries, a second apart, of a request that has to wait for two others.
PATIENCE = 120
QUESTION = "What is the weather in Paris?"
TURNS: list[Any] = [{"role": "user", "content": QUESTION}]
LONG: list[Any] = [{"role": "user", "content": "word " * 4000}]
TOO_LONG = ("context_length_exceeded", "maximum context length")
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": PARAMETERS,
}
TOOL: dict[str, Any] = {"type": "function", "function": WEATHER}
NAMED = {"type": "function", "function": {"name": "weather"}}
CITIES = ("Paris", "Rome")

Check = Callable[[], Awaitable[None]]


def city_of(arguments: Any) -> str:
    found = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert found["city"] in CITIES, found
    return str(found["city"])


async def refused(work: Awaitable[Any], *words: str) -> None:
    """``work`` fails, and says what about."""
    try:
        await work
    except Exception as exc:
        said = f"{type(exc).__name__} {exc}"
        assert any(word in said for word in words), said[:300]
        return
    raise AssertionError("nothing was refused")

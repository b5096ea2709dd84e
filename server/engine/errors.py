"""vLLM's exceptions and error responses as ours: the one place where they are mapped.

vLLM is imported inside the functions: this module is imported where no engine runs.
"""

from __future__ import annotations

import contextlib
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from server.engine.calls import EngineDied
from server.errors import BadRequest, Internal, ServerError, Unavailable

FAILED = "The engine failed on this request."
NO_TOOLS = (
    "Tool calls are not read on this server, since no parser is set for its base model. Leave out tools, or"
    " ask its operator to set LORAPLEX_TOOL_PARSER."
)
NOT_FETCHED = (
    "Images, audio and video are not fetched from that host. Send them in the request, as a data: URL;"
    " operators allow hosts with allowed_media_domains in LORAPLEX_ENGINE_ARGS."
)
TOO_LONG = "context_length_exceeded"
# vLLM says it in five places, in as many ways.
_TOO_LONG = re.compile(
    r"maximum context length|maximum\s+model\s+length|cannot be greater than max_model_len"
)
_OPENAI_WORDS = "This model's maximum context length is"
_MOST = re.compile(r"(?:context length \(|maximum\s+model\s+length of )([0-9]+)")
_GIVEN = re.compile(r"[Ll]ength \(?([0-9]+)\)")
# An answer that alone would be longer than a context.
_ANSWER = re.compile(r"(max_[a-z]*_?tokens)=([0-9]+) cannot be greater than max_model_len=([0-9]+)")
_TEXT_ALONE = re.compile(r"is not a multimodal model")
_OTHER_HOST = re.compile(r"must be from one of the allowed domains")
_NO_PART = re.compile(r"Unsupported chat content part type: '([a-z_]{1,40})")
_ABOUT_PROMPTS = (TOO_LONG, "not_supported_by_base")
# Ends of messages that are for who runs vLLM, or quote its objects.
_FOR_OTHERS = re.compile(
    r" To increase this limit, set the VLLM_\w+ environment variable\b.*"
    r"| but (?:multiple|none) are specified: .*",
    re.DOTALL,
)
_FIELD = re.compile(r"[a-z][a-z0-9_]*")
_TYPES = frozenset({"bool", "bytes", "dict", "float", "int", "list", "none", "nullable", "str", "tuple"})
_ABOUT = re.compile(r"`?([a-z][a-z_]*(?:\.[a-z_]+)?)`?(?::| must| cannot| should| is set)")
# Packages that read what a client sent, and whose AttributeError or LookupError is thus about that.
_READERS = frozenset(
    {"anthropic", "jinja2", "mistral_common", "openai", "openai_harmony", "pydantic", "tokenizers"}
    | {"transformers", "vllm"}
)


def from_vllm(message: str, status: int, param: str | None) -> ServerError:
    if status == 503:
        return Unavailable(message)
    if status >= 500:
        return Internal(FAILED)
    return refusal(message, param)


def named(error: ServerError, prompt: str | None) -> ServerError:
    """``error``, naming the field that holds a prompt which cannot be served: ``prompt``, if there is one."""
    if error.code in _ABOUT_PROMPTS and error.param is None:
        error.param = prompt
    elif error.param and error.param.partition(".")[0].isdigit():  # vLLM reads parts apart from their message
        error.message = f"a part in {prompt}: {error.message}"
        error.param = prompt
    return error


def filled(error: ServerError, request: Any, most: int) -> ServerError:
    """``error``, or what it means where a prompt fills the context: vLLM names a ``max_tokens`` of 0."""
    none_left = error.param == "max_tokens" and "got 0" in error.message
    if not none_left or getattr(request, "max_tokens", None) == 0:
        return error
    return BadRequest(
        f"This model's maximum context length is {most} tokens, and your prompt leaves none of them."
        " Please reduce the length of the input prompt.",
        code=TOO_LONG,
    )


def refusal(message: str, param: str | None) -> BadRequest:
    """vLLM's refusal of a request, with the code that OpenAI's clients look for and in words of ours."""
    message = _for_clients(message)
    if answer := _ANSWER.match(message):
        field, asked, most = answer.groups()
        told = f"{_OPENAI_WORDS} {most} tokens. However, you asked for an answer of {asked} tokens."
        return BadRequest(f"{told} Please ask for fewer.", code=TOO_LONG, param=field)
    if _TOO_LONG.search(message):
        return BadRequest(_as_openai_says(message), code=TOO_LONG)
    if _TEXT_ALONE.search(message):
        told = "The base model that is served here reads text alone, no images, audio or video."
        return BadRequest(told, code="not_supported_by_base")
    if _OTHER_HOST.search(message):
        return BadRequest(NOT_FETCHED, code="unsupported_parameter")
    if part := _NO_PART.match(message):
        told = f"Parts of the type `{part[1]}` are not served; send their text."
        return BadRequest(told, code="not_supported_by_base")
    if "--tool-call-parser" in message or "--enable-auto-tool-choice" in message:
        return BadRequest(NO_TOOLS, code="tools_not_served", param="tool_choice")
    return BadRequest(message, param=param or _named_in(message))


def _as_openai_says(message: str) -> str:
    """A prompt that is too long in OpenAI's words, by which libraries know it."""
    most = _MOST.search(message)
    if most is None or _OPENAI_WORDS in message:
        return message
    given = _GIVEN.search(message)
    shown = f"has {given[1]} tokens" if given else "is longer"
    return (
        f"{_OPENAI_WORDS} {most[1]} tokens. However, your prompt {shown}, and an answer has one at least."
        " Please reduce the length of the input prompt."
    )


@contextlib.contextmanager
def engine_errors() -> Iterator[None]:
    """For calls about the engine itself: its death is the only thing that can be wrong with them."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as exc:
        raise EngineDied(str(exc)) from exc


@contextlib.contextmanager
def request_errors() -> Iterator[None]:
    """For calls with a client's input: vLLM's exceptions mapped to ours, once, at the boundary."""
    from vllm.exceptions import GenerationError, GracefulHTTPError, VLLMClientError, VLLMError

    try:
        with engine_errors():
            yield
    except GenerationError as exc:
        if isinstance(exc.__cause__, ServerError):  # see ``admitted_stream``
            raise exc.__cause__ from None
        raise Internal(FAILED) from exc
    except (ServerError, EngineDied):
        raise
    except GracefulHTTPError as exc:
        raise Unavailable(str(exc)) from exc
    except VLLMClientError as exc:
        raise refusal(message_of(exc), getattr(exc, "parameter", None)) from exc
    except VLLMError as exc:
        raise Internal(FAILED) from exc
    except ValidationError as exc:
        raise invalid_request(exc) from exc
    except (ValueError, TypeError, OverflowError) as exc:
        raise refusal(message_of(exc), None) from exc


@contextlib.contextmanager
def parse_errors() -> Iterator[None]:
    """For reading a body: BadRequest that names the field.

    So is what vLLM trips over where it takes a type for granted before it looks at types. What code of ours
    trips over is raised as it is, and becomes a 500 with its traceback in the log.
    """
    from vllm.exceptions import VLLMValidationError

    try:
        yield
    except ValidationError as exc:
        raise invalid_request(exc) from exc
    except VLLMValidationError as exc:
        raise BadRequest(message_of(exc), param=exc.parameter) from exc
    except (ValueError, TypeError, OverflowError) as exc:
        raise BadRequest(message_of(exc)) from exc
    except (AttributeError, LookupError) as exc:
        if not _raised_by_a_reader(exc):
            raise
        if isinstance(exc, KeyError) and exc.args:
            raise BadRequest(f"A field `{str(exc.args[0])[:100]}` is missing.") from exc
        raise BadRequest("A part of the request has another type than it needs there.") from exc


def _raised_by_a_reader(exc: Exception) -> bool:
    """Whether the last step into a package on the way to ``exc``, Python's own aside, was into a reader's."""
    packages = (
        str(frame.f_globals.get("__name__", "")).partition(".")[0]
        for frame, _ in traceback.walk_tb(exc.__traceback__)
    )
    last = [package for package in packages if package not in sys.stdlib_module_names]
    return bool(last) and last[-1] in _READERS


def invalid_request(exc: ValidationError) -> BadRequest:
    """Of the first field that is wrong; of a union's errors, one for each member, that of the nearest."""
    found = _meant(exc.errors(include_url=False, include_input=False, include_context=False))
    depth = _field_depth(found[0]["loc"])
    same = [one for one in found if one["loc"][:depth] == found[0]["loc"][:depth]]
    # The first of those; a value of the wrong type says less than a wrong value.
    nearest = max(same, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    param = ".".join(str(part) for part in nearest["loc"] if _is_field(part)) or None
    message = _for_clients(nearest["msg"].removeprefix("Value error, "))
    return BadRequest(f"{param}: {message}" if param else message, param=param or _named_in(message))


def _meant(found: list[ErrorDetails]) -> list[ErrorDetails]:
    """Without the errors of those members of a union whose ``type`` is another one, where it has others."""
    others = {
        member
        for one in found
        if (member := _member(one)) and one["type"] == "literal_error" and one["loc"] == (*member, "type")
    }
    unions = {member[:-1] for one in found if (member := _member(one)) not in others}
    return [one for one in found if (member := _member(one)) not in others or member[:-1] not in unions]


def _member(error: ErrorDetails) -> tuple[int | str, ...]:
    """Where the member of a union is that ``error`` is of; empty for none."""
    loc = error["loc"]
    return loc[: max((at for at, part in enumerate(loc, 1) if not _is_field(part)), default=0)]


def _field_depth(loc: tuple[int | str, ...]) -> int:
    """How much of ``loc`` is before the first member of a union."""
    return next((at for at, part in enumerate(loc) if not _is_field(part)), len(loc))


def _is_field(part: int | str) -> bool:
    """Whether ``part`` of a place is a field or an index, and not a type's name."""
    return isinstance(part, int) or (_FIELD.fullmatch(part) is not None and part not in _TYPES)


def _named_in(message: str) -> str | None:
    """The field that vLLM's message is about where it says so in words alone."""
    found = _ABOUT.match(message)
    return found[1] if found else None


def message_of(exc: Exception) -> str:
    """The message alone: vLLM's ``str()`` appends the rejected value, however long it is."""
    return _for_clients(str(exc.args[0]) if exc.args else str(exc))


def _for_clients(message: str) -> str:
    """Without what no client can do."""
    kept = _FOR_OTHERS.sub("", message)
    return kept if kept == message or kept.endswith(".") else f"{kept}."

"""vLLM's exceptions and error responses as ours: the one place where they are mapped.

vLLM is imported inside the functions: this module is imported where no engine runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pydantic import ValidationError

from server.engine.calls import EngineDied
from server.errors import BadRequest, Internal, ServerError, Unavailable

FAILED = "The engine failed on this request."


def from_vllm(message: str, status: int, param: str | None) -> ServerError:
    if status == 503:
        return Unavailable(message)
    if status >= 500:
        return Internal(FAILED)
    return BadRequest(message, param=param)


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
        raise BadRequest(message_of(exc), param=getattr(exc, "parameter", None)) from exc
    except VLLMError as exc:
        raise Internal(FAILED) from exc
    except ValidationError as exc:
        raise invalid_request(exc) from exc
    except (ValueError, TypeError, OverflowError) as exc:
        raise BadRequest(message_of(exc)) from exc


@contextlib.contextmanager
def parse_errors() -> Iterator[None]:
    """For reading a body: BadRequest that names the field."""
    from vllm.exceptions import VLLMValidationError

    try:
        yield
    except ValidationError as exc:
        raise invalid_request(exc) from exc
    except VLLMValidationError as exc:
        raise BadRequest(message_of(exc), param=exc.parameter) from exc
    except (ValueError, TypeError, OverflowError) as exc:
        raise BadRequest(message_of(exc)) from exc


def invalid_request(exc: ValidationError) -> BadRequest:
    first = exc.errors(include_url=False, include_input=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    return BadRequest(f"{param}: {first['msg']}" if param else first["msg"], param=param)


def message_of(exc: Exception) -> str:
    """The message alone: vLLM's ``str()`` appends the rejected value, however long it is."""
    return str(exc.args[0]) if exc.args else str(exc)

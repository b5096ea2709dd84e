"""Structured log lines. They carry ids, tenants, adapters and counts, never prompts, answers or keys."""

from __future__ import annotations

import atexit
import json
import logging
import logging.config
import os
import re
import secrets
import tempfile
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pythonjsonlogger.core import RESERVED_ATTRS


@dataclass(frozen=True, slots=True)
class RequestIds:
    """How a request is known: ``own`` is the server's id, ``client`` the one that its client gave it.

    ``traceparent`` is what the server hands on: the trace of the client, or a new one. ``is_kept`` is False
    where there is a store of traces that does not get this one.
    """

    own: str
    client: str | None = None
    traceparent: str | None = None
    is_kept: bool = True

    @property
    def trace_id(self) -> str | None:
        """32 hexadecimal digits, by which traces are found."""
        return self.traceparent.split("-")[1] if self.traceparent else None


# The fields of the access line of that request, to which whoever knows something adds it.
LINE: ContextVar[dict[str, Any] | None] = ContextVar("line", default=None)
# Set for everything that is done for a request.
REQUEST: ContextVar[RequestIds | None] = ContextVar("request", default=None)
_TRACEPARENT = re.compile(
    r"([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)


def traceparent(given: str | None) -> str:
    """W3C's header for what the server does: the trace that ``given`` names, else a new one, not sampled.

    A malformed header, or version ff, is as none.
    """
    found = _TRACEPARENT.fullmatch(given) if given and len(given) <= 512 else None
    later = found is not None and found[5] is not None and found[1] == "00"
    if found is None or found[1] == "ff" or later:
        return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"
    return f"00-{found[2]}-{secrets.token_hex(8)}-{found[4]}"


class _OfRequest(logging.Filter):
    """Puts the ids of the request that a line is written for on it, where it has none."""

    def filter(self, record: logging.LogRecord) -> bool:
        ids = REQUEST.get()
        if ids is not None and not hasattr(record, "request_id"):
            record.request_id = ids.own
        return True


class _NotTwice(logging.Filter):
    """Drops uvicorn's traceback of a start that failed: ``create_app`` has said why in one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.name == "uvicorn.error" and str(record.msg).startswith("Traceback"))


class _NotOfModels(logging.Filter):
    """Drops vLLM's error for a call of a tool that is no whole one, unless its logger is at DEBUG.

    It is what a model wrote until ``max_tokens``, and its answer says so; any customer can have many of them.
    Parsers of JSON end on it with a ValueError, those of Python's syntax with a SyntaxError.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith("vllm.tool_parsers.") or not record.exc_info:
            return True
        if not isinstance(record.exc_info[1], ValueError | SyntaxError):
            return True
        return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


_FIELDS = "%(asctime)s %(levelname)s %(name)s %(message)s"
Form = Literal["json", "text"]


def configure(form: Form, level: str) -> None:
    """One handler on stderr for everything of this process; uvicorn's access log is replaced by ours."""
    logging.config.dictConfig(_configuration(form, level))
    logging.captureWarnings(True)


def configure_children(form: Form, level: str) -> None:
    """The same for the engine's processes, which read it from a file that the environment names.

    Left alone where the operator has named one.
    """
    if "VLLM_LOGGING_CONFIG_PATH" in os.environ:
        return
    file = tempfile.NamedTemporaryFile(  # noqa: SIM115  # it is there as long as this process
        "w", prefix="loraplex-logging-", suffix=".json", delete=False
    )
    with file:
        json.dump(_configuration(form, level), file)
    atexit.register(Path(file.name).unlink, missing_ok=True)
    os.environ["VLLM_LOGGING_CONFIG_PATH"] = file.name


def _configuration(form: Form, level: str) -> dict[str, Any]:
    """As ``logging.config.dictConfig`` takes it; also as JSON."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "json": {
                "()": "pythonjsonlogger.json.JsonFormatter",
                "fmt": _FIELDS,
                "rename_fields": {"asctime": "time", "levelname": "level", "name": "logger"},
                "reserved_attrs": [*RESERVED_ATTRS, "vllm_process_name", "fileinfo"],
            },
            "text": {"format": _FIELDS},
        },
        "filters": {
            "once": {"()": "server.logs._NotTwice"},
            "models": {"()": "server.logs._NotOfModels"},
            "request": {"()": "server.logs._OfRequest"},
        },
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "formatter": form,
                "filters": ["once", "models", "request"],
            }
        },
        "root": {"handlers": ["stderr"], "level": level.upper()},
        "loggers": {
            "uvicorn": {"level": "WARNING"},
            "uvicorn.access": {"level": "CRITICAL"},
            "alembic": {"level": "WARNING"},
            # At DEBUG it tells every SQL parameter, cache salts among them.
            "aiosqlite": {"level": "WARNING"},
            # Its level by its own variable; its lines go where all others go.
            "vllm": {
                "level": os.environ.get("VLLM_LOGGING_LEVEL", level.upper()),
                "handlers": [],
                "propagate": True,
            },
        },
    }

"""Structured log lines. They carry ids, tenants, adapters and counts, never prompts, answers or keys."""

from __future__ import annotations

import logging
import logging.config
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from pythonjsonlogger.core import RESERVED_ATTRS


@dataclass(frozen=True, slots=True)
class RequestIds:
    """How a request is known: ``own`` is the server's id, ``client`` the one that its client gave it."""

    own: str
    client: str | None = None


# Set for everything that is done for a request.
REQUEST: ContextVar[RequestIds | None] = ContextVar("request", default=None)


class _NotTwice(logging.Filter):
    """Drops uvicorn's traceback of a start that failed: ``create_app`` has said why in one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.name == "uvicorn.error" and str(record.msg).startswith("Traceback"))


_FIELDS = "%(asctime)s %(levelname)s %(name)s %(message)s"


def configure(form: Literal["json", "text"], level: str) -> None:
    """One handler on stderr for everything of this process; uvicorn's access log is replaced by ours."""
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "json": {
                    "()": "pythonjsonlogger.json.JsonFormatter",
                    "fmt": _FIELDS,
                    "rename_fields": {"asctime": "time", "levelname": "level", "name": "logger"},
                    "reserved_attrs": [*RESERVED_ATTRS, "vllm_process_name"],
                },
                "text": {"format": _FIELDS},
            },
            "filters": {"once": {"()": _NotTwice}},
            "handlers": {
                "stderr": {"class": "logging.StreamHandler", "formatter": form, "filters": ["once"]}
            },
            "root": {"handlers": ["stderr"], "level": level.upper()},
            "loggers": {
                "uvicorn": {"level": "WARNING"},
                "uvicorn.access": {"level": "CRITICAL"},
                "alembic": {"level": "WARNING"},
                # At DEBUG it tells every SQL parameter, cache salts among them.
                "aiosqlite": {"level": "WARNING"},
            },
        }
    )

"""What a client is told when its request does not run, or ends because the engine is gone."""

from __future__ import annotations

from adapters.errors import AdapterError, AdapterQuarantined, AdapterUnavailable
from server.errors import ServerError, TooManyRequests, Unavailable
from server.scheduling.nouns import Refusal

RESTART_S = 30  # about what a start takes; a large model needs minutes


def engine_restarting() -> Unavailable:
    """For what ran when the engine was lost, and cannot go on in the next one."""
    return Unavailable(
        "The engine had to be restarted; send the request again.",
        code="engine_restarting",
        retry_after=RESTART_S,
    )


def engine_stopped() -> Unavailable:
    """For everything, once the engine is not started any more: the process is about to end."""
    return Unavailable("The engine has stopped; the server is restarting.", code="engine_stopped")


def shutting_down() -> Unavailable:
    """For what comes, waits, or cannot go on while the server stops."""
    return Unavailable("The server is shutting down.", code="shutting_down", retry_after=5)


def quarantined(reason: str) -> AdapterQuarantined:
    """For what waits or runs when its version is taken out of service; ``reason`` as in "it made NaN"."""
    return AdapterQuarantined(f"The adapter is out of service: {reason}. The operator can release it.")


def error_of(
    reason: Refusal, retry_after: float | None = None, detail: str = ""
) -> ServerError | AdapterError:
    """What a client is told about ``reason``; see ``Refuse`` for ``detail``. ``retry_after``: seconds."""
    match reason:
        case Refusal.QUEUE_FULL:
            return TooManyRequests(
                "Too many of your requests are waiting already; send the next ones later.",
                code="rate_limit_exceeded",
                retry_after=retry_after,
            )
        case Refusal.QUEUE_TIMEOUT:
            return Unavailable(
                "The server is too busy: the request waited too long for its turn.",
                code="queue_timeout",
                retry_after=retry_after,
            )
        case Refusal.ADAPTER_UNAVAILABLE:
            return AdapterUnavailable("The adapter could not be loaded; try again in a moment.")
        case Refusal.DRAINING:
            return shutting_down()
        case Refusal.QUARANTINED:
            return quarantined(detail)

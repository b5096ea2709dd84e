"""What a client is told when a limit or a budget forbids its request."""

from __future__ import annotations

from datetime import datetime

from server.errors import BadRequest, Forbidden, TooManyRequests, Unavailable
from server.limits.budget import BudgetExceeded, period_end
from server.limits.rate import LimitExceeded, duration

# Seconds after which a request may be tried again when the ledger cannot be reached.
RETRY_AFTER_OUTAGE_S = 2.0


class BeyondLimits(TooManyRequests):
    """One that is larger than the limit itself: it is refused however often it is tried."""


def rate_limit_exceeded(exceeded: LimitExceeded, whose: str) -> TooManyRequests:
    """``whose`` is the limit: ``tenant`` or ``key <id>``."""
    what = exceeded.limit.replace("_", " ")
    text = f"Rate limit reached for this {whose.split()[0]}: {exceeded.allowed} {what}."
    if exceeded.never:
        text += f" This request may use {exceeded.asked}; make it shorter, or ask for fewer max_tokens."
    else:
        text += f" Try again in {duration(exceeded.retry_after)}."
    error = BeyondLimits if exceeded.never else TooManyRequests
    return error(text, code="rate_limit_exceeded", retry_after=exceeded.retry_after)


def insufficient_quota(exceeded: BudgetExceeded, tokens: int, now: datetime) -> TooManyRequests:
    """For a request of at most ``tokens``; it may be tried again when the period is over."""
    text = f"You exceeded your current quota: {exceeded} used or reserved"
    if exceeded.used < exceeded.limit and exceeded.unit == "tokens":
        text += f", and this request may use {tokens} tokens; ask for fewer max_tokens"
    seconds = (period_end(exceeded.period, now) - now).total_seconds()
    return TooManyRequests(f"{text}.", code="insufficient_quota", retry_after=seconds)


def limits_unavailable() -> Unavailable:
    """The ledger cannot be reached."""
    return Unavailable(
        "Your limits cannot be looked up at the moment. Try again shortly.",
        code="limits_unavailable",
        retry_after=RETRY_AFTER_OUTAGE_S,
    )


def model_not_allowed() -> Forbidden:
    """Neither the tenant's nor the key's list has the model."""
    return Forbidden("This model is not one that you may use.", code="model_not_allowed", param="model")


def adapter_not_allowed() -> Forbidden:
    """The key's list does not have the adapter that it would manage."""
    return Forbidden(
        "This key's limits name the adapters that it may manage, and this is none of them.",
        code="model_not_allowed",
        param="name",
    )


def max_tokens_too_large(whose: str, most: int, param: str) -> BadRequest:
    """One answer may have at most ``most`` tokens; ``param`` asked for more."""
    return BadRequest(
        f"Answers for this {whose.split()[0]} may have at most {most} tokens.",
        code="max_tokens_too_large",
        param=param,
    )

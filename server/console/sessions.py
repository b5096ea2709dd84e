"""Who is signed in to the console: sessions of a bounded number, in this process, for a bounded time."""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["operator", "customer"]

IDLE_S = 2 * 3600.0
LIFETIME_S = 12 * 3600.0
TICKET_S = 600.0
MAX_SESSIONS = 1000


@dataclass(slots=True)
class Session:
    """``key`` is the API key that was given at sign-in; every page asks the API with it.

    ``csrf`` is what a page must send along to change something. ``playground`` has the short-lived keys that
    an operator made to try customers' adapters, by tenant. ``id_token`` is the provider's where that let
    somebody in, and ``person`` their name. Times are in seconds of a monotonic clock.
    """

    key: str
    role: Role
    name: str
    csrf: str
    made: float
    used: float
    playground: dict[str, str] = field(default_factory=dict)
    id_token: str | None = None
    person: str | None = None
    lifetime: float = LIFETIME_S


class Sessions:
    """Sessions and tickets by the digest of their token: a copy of this memory signs nobody in."""

    def __init__(self, *, limit: int = MAX_SESSIONS) -> None:
        self._limit = limit
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._tickets: OrderedDict[str, tuple[str, float]] = OrderedDict()

    @staticmethod
    def make(key: str, role: Role, name: str, now: float) -> Session:
        """A session that has not started yet."""
        return Session(key, role, name, secrets.token_urlsafe(32), now, now)

    def start(self, session: Session) -> str:
        """The token for its cookie; beyond the limit, the session used longest ago ends."""
        token = secrets.token_urlsafe(32)
        self._sessions[_digest(token)] = session
        while len(self._sessions) > self._limit:
            self._sessions.popitem(last=False)
        return token

    def find(self, token: str, now: float) -> Session | None:
        """The session of this token, unless it was unused for ``IDLE_S`` or is older than ``lifetime``."""
        digest = _digest(token)
        session = self._sessions.get(digest)
        if session is None:
            return None
        if now - session.used > IDLE_S or now - session.made > session.lifetime:
            del self._sessions[digest]
            return None
        session.used = now
        self._sessions.move_to_end(digest)
        return session

    def end(self, token: str) -> None:
        """Signs out; nothing where there is no such session."""
        self._sessions.pop(_digest(token), None)

    def ticket(self, key: str, now: float) -> str:
        """A token that gives ``key`` away once, within ``TICKET_S``."""
        token = secrets.token_urlsafe(32)
        self._tickets[_digest(token)] = (key, now)
        while len(self._tickets) > self._limit:
            self._tickets.popitem(last=False)
        return token

    def redeem(self, token: str, now: float) -> str | None:
        """The key of a ticket, which is gone then; None for one that is unknown, used or too old."""
        key, made = self._tickets.pop(_digest(token), ("", float("-inf")))
        return key if now - made <= TICKET_S else None


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()

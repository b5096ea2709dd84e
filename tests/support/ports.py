"""Ports for servers that are started later, or again."""

from __future__ import annotations

import secrets

from server.demo.process import free_port

# Below those that a kernel gives to whoever asks for any, which another process may get in between.
LOWEST, HIGHEST = 20_000, 32_000


def unused() -> int:
    """A port of 127.0.0.1 where nobody listens, and that nobody gets by chance."""
    return free_port(LOWEST + secrets.randbelow(HIGHEST - LOWEST))

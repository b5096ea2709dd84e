"""What a process listens on, and where it is then asked. Pure; no name is looked up."""

from __future__ import annotations

from ipaddress import ip_address
from socket import AF_INET, AF_INET6, AddressFamily


def is_every(host: str) -> bool:
    """Whether who listens on ``host`` does so on every address of the machine (``0.0.0.0``, ``::``)."""
    try:
        return not host or ip_address(host).is_unspecified
    except ValueError:  # a name
        return False


def from_here(host: str) -> str:
    """Where a process that listens on ``host`` is reached from its own machine."""
    if not is_every(host):
        return host
    return "::1" if ":" in host else "127.0.0.1"


def family_of(host: str) -> AddressFamily:
    """The kind of socket that binds to ``host``."""
    return AF_INET6 if ":" in host else AF_INET


def url_of(host: str, port: int) -> str:
    """The URL of HTTP; an address of IPv6 has brackets there."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

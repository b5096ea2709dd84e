"""How often each client address has come with a wrong key of late: pure counting."""

from __future__ import annotations

from collections import OrderedDict
from ipaddress import IPv6Address, ip_address, ip_network

WINDOW_S = 60.0
# Addresses that are remembered; beyond them whoever failed longest ago is forgotten.
MAX_ADDRESSES = 10_000


class WrongKeys:
    """Allows ``most`` wrong keys of each address in ``WINDOW_S``; 0 allows any number. It may be changed.

    Times are in seconds of a clock that does not go back. Addresses of one IPv6 /64 network, which is what a
    single client is given, count as one.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._counts: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, address: str, now: float) -> float | None:
        """Counts a wrong key of ``address``.

        Returns None while that is one of those allowed, then the seconds after which they begin anew.
        """
        if not self.most:
            return None
        origin = _origin(address)
        since, count = self._counts.pop(origin, (now, 0))
        if since + WINDOW_S <= now:
            since, count = now, 0
        self._counts[origin] = since, count + 1
        if len(self._counts) > MAX_ADDRESSES:
            self._counts.popitem(last=False)
        return since + WINDOW_S - now if count >= self.most else None


def _origin(address: str) -> str:
    """What an address is counted under; itself where it is none, as for a Unix socket."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if not isinstance(parsed, IPv6Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ip_network((int(parsed), 64), strict=False).network_address)

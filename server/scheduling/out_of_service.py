"""Versions whose quarantine is decided, while the database cannot be told of it yet."""

from __future__ import annotations

from adapters.model import Version
from server.scheduling.refusals import quarantined


class OutOfService:
    """Refuses them meanwhile: by tenant and files, as the rows do afterwards. Gone with the process.

    A version without a number is being tried by its upload, which says itself what is wrong with it.
    """

    def __init__(self) -> None:
        self._reasons: dict[tuple[str, str], dict[str, str]] = {}  # by files, then by key

    def put(self, key: str, reason: str) -> None:
        """``key`` is ``Version.key``; the first reason stays."""
        self._reasons.setdefault(_files(key), {}).setdefault(key, reason)

    def take_out(self, key: str) -> None:
        """The rows say it now, or there is no such version any more. Its files stay where another key has
        them here, whose row may be still to come."""
        kept = self._reasons.get(_files(key), {})
        kept.pop(key, None)
        if not kept:
            self._reasons.pop(_files(key), None)

    def has(self, version: Version) -> bool:
        return version.number > 0 and _files(version.key) in self._reasons

    def check(self, version: Version | None) -> None:
        """Raises AdapterQuarantined for one of them; None is the base."""
        if version is not None and self.has(version):
            raise quarantined(next(iter(self._reasons[_files(version.key)].values())))

    def __repr__(self) -> str:
        return f"<OutOfService {sorted(f'{tenant}@{digest}' for tenant, digest in self._reasons)}>"


def _files(key: str) -> tuple[str, str]:
    tenant, _, rest = key.partition("/")
    return tenant, rest.rpartition("@")[2]

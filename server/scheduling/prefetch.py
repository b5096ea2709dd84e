"""What is to be loaded although nobody waits for it: pinned versions, and those that were asked for once.

A pinned version is wanted in a slot whenever it is not in one. One that was asked for is wanted until it is
in host memory, or in a slot. Where they go is ``Residency``'s; this is only who is next, and who is told.
"""

from __future__ import annotations

from collections.abc import Callable

from server.scheduling.nouns import Refusal, State, Warmed


class Prefetch:
    """The loads that no request waits for. ``emit`` gets one ``Warmed`` for everything that was asked for and
    not withdrawn.
    """

    def __init__(self, emit: Callable[[Warmed], None]) -> None:
        self._emit = emit
        self._asked: dict[str, bool] = {}  # by arrival: whether a slot is wanted too
        self._failed: set[str] = set()  # pinned ones that are left alone until somebody wants them anew
        self._to_stage: dict[str, None] = {}  # by arrival
        self._to_activate: dict[str, None] = {}
        self._stopped = False

    def ask(self, version: str, slot: bool) -> None:
        """Load ``version`` once, with ``slot`` into a slot."""
        self._asked[version] = slot or self._asked.get(version, False)
        self._failed.discard(version)

    def withdraw(self, version: str) -> None:
        """Forget the version: nobody waits for it to be warm any more."""
        self._asked.pop(version, None)

    def retry(self, version: str) -> None:
        """Try the version again: what kept it from being loaded may be over."""
        self._failed.discard(version)

    def retry_all(self) -> None:
        """What kept any version from being loaded may be over."""
        self._failed.clear()

    def failed(self, version: str, pinned: bool) -> None:
        """``version`` could not be loaded. Whoever asked for it is told; a pin does not retry by itself."""
        if pinned:
            self._failed.add(version)
        self.end(version, Refusal.ADAPTER_UNAVAILABLE)

    def end(self, version: str, refusal: Refusal | None = None) -> None:
        """Tell who asked for it; nothing happens if nobody did."""
        if self._asked.pop(version, None) is not None:
            self._emit(Warmed(version, refusal))

    def stop(self) -> None:
        """Load nothing more without a request."""
        self._stopped = True
        for version in list(self._asked):
            self.end(version, Refusal.DRAINING)

    def index(self, version: str, state: State, *, pinned: bool, claimed: bool) -> None:
        """Bring the order up to date with where ``version`` is now, and who wants it."""
        slot = self._asked.get(version)
        if slot is not None and (state is State.ACTIVE or (not slot and state.is_staged)):
            self.end(version)
            slot = None
        keep = pinned and version not in self._failed
        _keep(self._to_stage, version, state is State.DISK and not claimed and (keep or slot is not None))
        _keep(self._to_activate, version, state is State.HOST and not claimed and (keep or bool(slot)))

    @property
    def next_to_stage(self) -> str | None:
        """The next version to read from disk."""
        return None if self._stopped else next(iter(self._to_stage), None)

    @property
    def next_to_activate(self) -> str | None:
        """The next version on the host to be given a slot."""
        return None if self._stopped else next(iter(self._to_activate), None)

    def known(self) -> set[str]:
        """Every version that may still be next."""
        return set(self._asked) | set(self._to_stage) | set(self._to_activate)


def _keep(order: dict[str, None], version: str, wanted: bool) -> None:
    if wanted:
        order.setdefault(version)
    else:
        order.pop(version, None)

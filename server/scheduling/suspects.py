"""Which versions may have ended the engine, and how they are told apart. Pure: no clock, no engine.

A version that was running when the engine was lost is a suspect. From then on it runs apart from every other
suspect: while a request of one runs, the others wait, whatever slots they have. So the next loss meets one
suspect at most, and that one was there twice in a row. A suspect that has finished some requests, or written
a good deal, without a loss is cleared. Cleared or not, it is remembered; see ``evidence``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from server.scheduling.evidence import Evidence

TWICE = "it was running when the engine was lost, twice in a row"
EACH_TIME = (
    "it ran each time the engine was lost, {times} times in ten minutes, "
    "and seldom ran or began requests in between"
)

# What a suspect has to do without a loss, of either: few, so that other suspects do not wait for long.
CLEARED_AFTER_REQUESTS = 4
CLEARED_AFTER_TOKENS = 1000


@dataclass(slots=True)
class Record:
    """What a suspect has done since the loss, and does now. ``is_open`` while its slot takes requests."""

    finished: int = 0
    tokens: int = 0
    running: int = 0
    is_open: bool = False

    @property
    def is_cleared(self) -> bool:
        return self.finished >= CLEARED_AFTER_REQUESTS or self.tokens >= CLEARED_AFTER_TOKENS


class Suspects:
    """Stands between residency and the queue: ``gate`` is the queue's, told which versions may run.

    ``changed`` is told who the suspects are whenever that changes; ``known`` are those to begin with.
    """

    def __init__(
        self,
        gate: Callable[[str, bool], None],
        changed: Callable[[frozenset[str]], None],
        known: Iterable[str] = (),
    ) -> None:
        self._gate = gate
        self._changed = changed
        self._records = {version: Record() for version in known}
        self._turn: str | None = None  # the one that runs
        self.evidence = Evidence()

    @property
    def versions(self) -> frozenset[str]:
        """Those under suspicion now."""
        return frozenset(self._records)

    def gate(self, version: str, is_open: bool) -> None:
        """Residency says whether ``version`` has a slot that takes requests."""
        record = self._records.get(version)
        if record is not None:
            record.is_open = is_open
        self._gate(version, is_open and self.may_run(version))

    def may_run(self, version: str) -> bool:
        """Whether no other suspect is in its way."""
        return self._turn in (None, version) or version not in self._records

    def began(self, version: str, now: float) -> None:
        """A request of ``version`` runs now."""
        self.evidence.began(version, now)
        record = self._records.get(version)
        if record is None:
            return
        record.running += 1
        if self._turn is None:
            self._turn = version
            self._gate_others()

    def progressed(self, version: str, tokens: int) -> None:
        """A request of it has written so many more tokens."""
        record = self._records.get(version)
        if record is not None:
            record.tokens += tokens
            self._judge(version, record)

    def ended(self, version: str, now: float, *, finished: bool) -> None:
        """A request of it runs no more; ``finished`` unless it was cancelled, failed or put aside."""
        self.evidence.ended(version, now)
        record = self._records.get(version)
        if record is None or not record.running:  # it began before the loss
            return
        record.running -= 1
        record.finished += finished
        self._judge(version, record)
        if not record.running:
            self._pass_on(version)

    def lost(self, running: Collection[str], now: float) -> dict[str, str]:
        """The engine was lost while these ran: who must have ended it, and why, by name.

        They will not run any more; the others are the suspects from now on. No version has a slot now.
        """
        guilty = dict.fromkeys(sorted(self._records.keys() & set(running)), TWICE)
        for version in self.evidence.lost(running, now):
            guilty.setdefault(version, EACH_TIME.format(times=len(self.evidence.losses)))
        self.evidence.explained(guilty)
        self._records = {version: Record() for version in sorted(set(running)) if version not in guilty}
        self._turn = None
        self._changed(self.versions)
        return guilty

    def _judge(self, version: str, record: Record) -> None:
        if record.is_cleared:
            del self._records[version]
            self._changed(self.versions)
            self._pass_on(version)

    def _pass_on(self, version: str) -> None:
        if self._turn == version:
            self._turn = None
            self._gate_others()

    def _gate_others(self) -> None:
        for version, record in self._records.items():
            self._gate(version, record.is_open and self.may_run(version))

    def __repr__(self) -> str:
        return f"<Suspects {sorted(self._records)} turn={self._turn}>"

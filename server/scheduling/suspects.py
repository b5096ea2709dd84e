"""Which versions may have ended the engine, and how they are told apart. Pure: no clock, no engine.

A version that was running when the engine was lost is a suspect. From then on it runs apart from every other
suspect: while a request of one runs, the others wait, whatever slots they have. So the next loss meets one
suspect at most, and that one was there twice in a row. A suspect that has finished some requests, or written
a good deal, without a loss is cleared.

Whoever knows that could do harmless work before each blow. So a version that was cleared and is there at the
next loss too has ended the engine if it ran alone; otherwise it is a suspect again, and has to do many times
as much as before. Suspects take turns of as much work as clears one, for others not to wait for longer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

# What a suspect has to do without a loss, of either: few, so that other suspects do not wait for long.
CLEARED_AFTER_REQUESTS = 4
CLEARED_AFTER_TOKENS = 1000
# How many times as much for each further loss in a row. At 64 the third in ten minutes, after which a server
# does not start its engine again by default, takes 256 requests, and one more takes 16,384.
HARDER = 64


@dataclass(slots=True)
class _Record:
    """What a suspect has done since the loss, and does now. ``losses`` counts those in a row that it was
    there at, and ``is_open`` says whether its slot takes requests."""

    losses: int = 1
    finished: int = 0
    tokens: int = 0
    running: int = 0
    is_open: bool = False
    before_turn: tuple[int, int] = (0, 0)  # what it had finished and written when its turn began

    @property
    def is_cleared(self) -> bool:
        return _is_enough(self.finished, self.tokens, HARDER ** (self.losses - 1))

    @property
    def has_had_turn(self) -> bool:
        finished, tokens = self.before_turn
        return _is_enough(self.finished - finished, self.tokens - tokens, 1)


def _is_enough(finished: int, tokens: int, times: int) -> bool:
    return finished >= CLEARED_AFTER_REQUESTS * times or tokens >= CLEARED_AFTER_TOKENS * times


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
        self._records = {version: _Record() for version in known}
        self._losses = dict.fromkeys(self._records, 1)  # in a row, of what was there at the last one
        self._turn: str | None = None  # the one that runs

    @property
    def versions(self) -> frozenset[str]:
        """Those under suspicion now."""
        return frozenset(self._records)

    def gate(self, version: str, is_open: bool) -> None:
        """Residency says whether ``version`` has a slot that takes requests."""
        record = self._records.get(version)
        if record is not None:
            record.is_open = is_open
            if self._turn not in (None, version):  # whose turn may end for this one's sake
                self._gate(self._turn, self._records[self._turn].is_open and self.may_run(self._turn))
        self._gate(version, is_open and self.may_run(version))

    def may_run(self, version: str) -> bool:
        """Whether no other suspect is in its way, nor waits for the end of its turn."""
        record = self._records.get(version)
        if record is None or self._turn is None:
            return True
        return self._turn == version and not (record.has_had_turn and self._others_wait(version))

    def began(self, version: str) -> None:
        """A request of ``version`` runs now."""
        record = self._records.get(version)
        if record is None:
            return
        record.running += 1
        if self._turn is None:
            self._turn = version
            record.before_turn = (record.finished, record.tokens)
            self._gate_others()

    def progressed(self, version: str, tokens: int) -> None:
        """A request of it has written so many more tokens."""
        record = self._records.get(version)
        if record is not None:
            record.tokens += tokens
            self._judge(version, record)

    def ended(self, version: str, *, finished: bool) -> None:
        """A request of it runs no more; ``finished`` unless it was cancelled, failed or put aside."""
        record = self._records.get(version)
        if record is None or not record.running:  # it began before the loss
            return
        record.running -= 1
        record.finished += finished
        self._judge(version, record)
        if not record.running:
            self._pass_on(version)

    def lost(self, running: Collection[str]) -> list[str]:
        """The engine was lost while these ran: those of them that must have ended it, by name.

        They will not run any more; the others are the suspects from now on. No version has a slot now.
        """
        ran = set(running)
        guilty = self._records.keys() & ran
        if len(ran) == 1:  # it has done harmless work since the last loss, and nobody else can have been it
            guilty |= self._losses.keys() & ran
        self._losses = {version: self._losses.get(version, 0) + 1 for version in sorted(ran - guilty)}
        self._records = {version: _Record(losses) for version, losses in self._losses.items()}
        self._turn = None
        self._changed(self.versions)
        return sorted(guilty)

    def _others_wait(self, version: str) -> bool:
        return any(record.is_open for other, record in self._records.items() if other != version)

    def _judge(self, version: str, record: _Record) -> None:
        if record.is_cleared:
            del self._records[version]
            self._changed(self.versions)
            self._gate(version, record.is_open)
            self._pass_on(version)
        elif record.has_had_turn:
            self._gate(version, record.is_open and self.may_run(version))

    def _pass_on(self, version: str) -> None:
        if self._turn == version:
            self._turn = None
            self._gate_others()

    def _gate_others(self) -> None:
        for version, record in self._records.items():
            self._gate(version, record.is_open and self.may_run(version))

    def __repr__(self) -> str:
        return f"<Suspects {sorted(self._records)} turn={self._turn}>"

"""Prompts that rollouts replay, and what the replays found, as rows.

A row has an encrypted prompt, or the numbers of its replay, never both: the prompt goes in the transaction
that keeps the numbers, and the row in the one in which the rollout takes them in (``Rollouts.save``). All
rows of a rollout go with its end, those of a tenant when it takes its consent back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, delete, func, or_, select, update

from adapters.database.database import Database
from adapters.database.rows import RolloutPromptRow, RolloutRow, TenantRow

ACTIVE = ("running", "held")


@dataclass(frozen=True, slots=True)
class Kept:
    """A prompt as it is stored; ``tries`` are the replays that were begun, this one too."""

    id: int
    sealed: bytes
    tries: int


class Prompts:
    """The rows of all rollouts."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def keep(self, rollout: str, sealed: bytes, key: str, most: int) -> bool:
        """Keeps a prompt of a rollout that goes on, of a tenant that agrees to it; False otherwise.

        No more than ``most`` wait at once. ``key`` names the key that it is encrypted with.
        """
        async with self._database.append() as session:
            owner = await session.scalar(select(RolloutRow.tenant).where(RolloutRow.id == rollout))
            # Locked in this order, as by whoever ends the rollout or takes the consent back.
            tenant = await session.get(TenantRow, owner, with_for_update=True) if owner else None
            row = await session.get(RolloutRow, rollout, with_for_update=True)
            if tenant is None or row is None or row.state not in ACTIVE:
                return False
            waiting = select(func.count()).where(
                RolloutPromptRow.rollout == rollout, RolloutPromptRow.sealed.is_not(None)
            )
            if not tenant.sample_prompts or (await session.scalar(waiting) or 0) >= most:
                return False
            session.add(RolloutPromptRow(rollout=rollout, key=key, sealed=sealed, tries=0, result=None))
            return True

    async def next(self, rollout: str) -> Kept | None:
        """The oldest prompt that waits, which counts as tried once more; None if none does."""
        mine = (RolloutPromptRow.rollout == rollout, RolloutPromptRow.sealed.is_not(None))
        query = select(RolloutPromptRow.id, RolloutPromptRow.sealed, RolloutPromptRow.tries).where(*mine)
        async with self._database.read() as session:
            found = (await session.execute(query.order_by(RolloutPromptRow.id).limit(1))).one_or_none()
        if found is None or found[1] is None:
            return None
        async with self._database.append() as session:
            tried = update(RolloutPromptRow).where(RolloutPromptRow.id == found[0])
            await session.execute(tried.values(tries=found[2] + 1))
        return Kept(found[0], found[1], found[2] + 1)

    async def replayed(self, id_: int, result: Mapping[str, Any]) -> None:
        """Puts what its replay found in the place of a prompt; nothing where it is gone."""
        mine = (RolloutPromptRow.id == id_, RolloutPromptRow.sealed.is_not(None))
        async with self._database.append() as session:
            values = {"sealed": None, "result": dict(result)}
            await session.execute(update(RolloutPromptRow).where(*mine).values(values))

    async def is_kept(self, id_: int) -> bool:
        """Whether the prompt is still there: it goes with its rollout, and with the consent."""
        mine = (RolloutPromptRow.id == id_, RolloutPromptRow.sealed.is_not(None))
        async with self._database.read() as session:
            return await session.scalar(select(RolloutPromptRow.id).where(*mine)) is not None

    async def results(self, rollout: str) -> list[tuple[int, Mapping[str, Any]]]:
        """What replays have found that the rollout has not taken in, by row."""
        query = select(RolloutPromptRow.id, RolloutPromptRow.result).where(
            RolloutPromptRow.rollout == rollout, RolloutPromptRow.result.is_not(None)
        )
        async with self._database.read() as session:
            return [(row[0], row[1]) for row in await session.execute(query.order_by(RolloutPromptRow.id))]

    async def waiting(self) -> int:
        """How many prompts are stored."""
        query = select(func.count()).select_from(RolloutPromptRow)
        async with self._database.read() as session:
            return await session.scalar(query.where(RolloutPromptRow.sealed.is_not(None))) or 0

    async def forget(self, key: str | None) -> int:
        """Removes what is not encrypted with the key of this name, and what no rollout needs; how many."""
        ended = select(RolloutRow.id).where(RolloutRow.state.not_in(ACTIVE))
        sealed = RolloutPromptRow.sealed.is_not(None)
        other = sealed if key is None else and_(sealed, RolloutPromptRow.key != key)
        async with self._database.append() as session:
            gone = delete(RolloutPromptRow).where(or_(other, RolloutPromptRow.rollout.in_(ended)))
            return int((await session.execute(gone)).rowcount)  # type: ignore[attr-defined]

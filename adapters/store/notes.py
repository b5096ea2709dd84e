"""What people write beside a version."""

from __future__ import annotations

from adapters.database.audit import note
from adapters.database.database import Database
from adapters.database.rows import MAX_INTEGER, VersionRow
from adapters.errors import AdapterNotFound
from adapters.model import well_formed


async def annotate(database: Database, tenant: str, name: str, number: int, text: str | None) -> None:
    """Keeps ``text`` with the version, None for nothing; it is in the audit. AdapterNotFound."""
    known = well_formed(tenant, name) and 1 <= number <= MAX_INTEGER
    async with database.write() as session:
        row = await session.get(VersionRow, (tenant, name, number), with_for_update=True) if known else None
        if row is None:
            raise AdapterNotFound(f"There is no version {number} of this name.", code="version_not_found")
        before, after = {"note": row.note}, {"note": text}
        note(session, "version.note", tenant, f"{name}@{number}", before=before, after=after)
        row.note = text

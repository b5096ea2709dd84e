"""What is said of a database that cannot be used."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import make_url

from adapters.database.unusable import DatabaseUnusable, usable


async def test_one_that_answers_nothing_is_said_to_do_so() -> None:
    told = r"^the database sqlite:///x\.db cannot be used: no answer came"

    async def wait() -> None:
        with usable(make_url("sqlite:///x.db")):
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)

    with pytest.raises(DatabaseUnusable, match=told):
        await wait()

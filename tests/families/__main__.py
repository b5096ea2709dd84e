"""``make families``: adapters on tiny bases of each family, on the real engine, against PEFT in float32.

Prints a table, and with ``--write`` puts it into docs/adapters.md. Ends with 1 where one is served wrongly.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests.families.measure import Row, measure, table
from tests.support.families import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
BEGIN, END = "<!-- families: written by make families -->", "<!-- /families -->"


async def _rows(names: list[str]) -> list[Row]:
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="loraplex-family-") as folder:
            rows.append(await measure(name, Path(folder)))
        print(f"{name}: {rows[-1]}", file=sys.stderr, flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help=f"some of {', '.join(FAMILIES)}; all without")
    parser.add_argument("--write", action="store_true", help="write the table into docs/adapters.md")
    given = parser.parse_args()
    rows = asyncio.run(_rows(given.families or list(FAMILIES)))
    found = table(rows)
    print(found)
    if given.write:
        text = PAGE.read_text()
        head, tail = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(f"{head}{BEGIN}\n{found}{END}{tail}")
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())

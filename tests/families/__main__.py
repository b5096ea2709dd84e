"""``make families``: adapters on tiny bases of each family, on the real engine, against PEFT in float32.

Then on a tiny Llama in each quantized format. Prints the tables, and with ``--write`` puts them into
docs/adapters.md. Ends with 1 where one is served wrongly.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests.families.classifiers import BASES, ClassifierRow, classifier_table, measure_classifier
from tests.families.measure import Row, measure, table
from tests.families.qlora import QLORA, QloraRow, measure_qlora, qlora_table
from tests.families.quantized import PLAIN, QuantizedRow, measure_quantized, quantized_table
from tests.support.families import FAMILIES
from tests.support.quantized import KINDS

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
FAMILY_ROWS = "<!-- families: written by make families -->\n", "<!-- /families -->"
QUANTIZED_ROWS = "<!-- quantized: written by make families -->\n", "<!-- /quantized -->"
CLASSIFIER_ROWS = "<!-- classifiers: written by make families -->\n", "<!-- /classifiers -->"
QLORA_ROWS = "<!-- qlora: written by make families -->\n", "<!-- /qlora -->"
# (kind, type): four bits in float32 are refused, eight run in it.
QUANTIZED = {
    **dict.fromkeys((PLAIN, *KINDS), ("bfloat16",)),
    "w4a16": ("bfloat16", "float32"),
    "w8a8": ("bfloat16", "float32"),
}


async def _rows(names: list[str]) -> list[Row]:
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="loraplex-family-") as folder:
            rows.append(await measure(name, Path(folder)))
        print(f"{name}: {rows[-1]}", file=sys.stderr, flush=True)
    return rows


async def _classifier_rows(kinds: list[str]) -> list[ClassifierRow]:
    rows = []
    for kind in kinds:
        with tempfile.TemporaryDirectory(prefix="loraplex-classifier-") as folder:
            rows.append(await measure_classifier(kind, Path(folder)))
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


async def _qlora(wanted: bool) -> tuple[list[QloraRow], str]:
    if not wanted:
        return [], ""
    with tempfile.TemporaryDirectory(prefix="loraplex-qlora-") as folder:
        found = await measure_qlora(Path(folder))
    print(found, file=sys.stderr, flush=True)
    return found


async def _quantized_rows(kinds: list[str]) -> list[QuantizedRow]:
    rows = []
    for kind in kinds:
        for dtype in QUANTIZED[kind]:
            with tempfile.TemporaryDirectory(prefix="loraplex-quantized-") as folder:
                rows.append(await measure_quantized(kind, Path(folder), dtype=dtype))
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _write(found: str, begin: str, end: str) -> None:
    head, rest = PAGE.read_text().split(begin)
    PAGE.write_text(f"{head}{begin}{found}{end}{rest.split(end)[1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    everything = [*FAMILIES, *BASES, *QUANTIZED, QLORA]
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(everything)}")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/adapters.md")
    given = parser.parse_args()
    if unknown := set(given.names) - set(everything):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(everything)}")
    names = given.names or everything
    rows = asyncio.run(_rows([name for name in names if name in FAMILIES]))
    heads = asyncio.run(_classifier_rows([name for name in names if name in BASES]))
    few = asyncio.run(_quantized_rows([name for name in names if name in QUANTIZED]))
    bits, training = asyncio.run(_qlora(QLORA in names))
    tables = (
        (table(rows), FAMILY_ROWS),
        (classifier_table(heads), CLASSIFIER_ROWS),
        (quantized_table(few), QUANTIZED_ROWS),
        (qlora_table(bits, training), QLORA_ROWS),
    )
    for found, place in tables:
        print(found)
        if given.write:
            _write(found, *place)
    return int(any(row.wrong for row in (*rows, *heads, *bits)))


if __name__ == "__main__":
    sys.exit(main())

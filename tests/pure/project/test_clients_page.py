"""docs/clients.md: a cell in which a library is not tried says why."""

from __future__ import annotations

from pathlib import Path

from tests.clients.libraries_known import CHECKS, JAVASCRIPT, NOT_THERE, PYTHON, REASONS, WHY_NOT

PAGE = (Path(__file__).parents[3] / "docs" / "clients.md").read_text()


def test_each_cell_without_a_check_has_its_reason() -> None:
    rows = {}
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == len(CHECKS) + 2:
            rows[cells[0]] = dict(zip(CHECKS, cells[2:], strict=True))
    assert [*rows] == ["library", "---", *PYTHON, *JAVASCRIPT]
    absent = {(name, check) for name, row in rows.items() for check in row if row[check] == NOT_THERE}
    assert absent == REASONS.keys()
    assert WHY_NOT in PAGE
    for (library, check), reason in REASONS.items():
        assert f"{library}, {check}: {reason}." in PAGE

"""Public definitions say what they are for: at most a fifth go without a docstring."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]
MOST_WITHOUT = 1 / 5


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, bool]]:
    """(name, whether it has a docstring) of every function, class and method without a leading underscore."""
    for node in body:
        defined = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if defined and not node.name.startswith("_"):
            yield prefix + node.name, ast.get_docstring(node) is not None
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")


def test_most_public_definitions_have_a_docstring() -> None:
    found = [
        (f"{path.relative_to(ROOT)}: {name}", has)
        for package in ("server", "adapters")
        for path in sorted((ROOT / package).rglob("*.py"))
        if "migrations" not in path.parts
        for name, has in public(ast.parse(path.read_text()).body)
    ]
    without = [name for name, has in found if not has]
    share = len(without) / len(found)
    assert share <= MOST_WITHOUT, f"{share:.0%} are without: " + "\n".join(without)

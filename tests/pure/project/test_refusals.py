"""Every refusal of an upload is raised somewhere, ends with its cure, and is shown by a test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from adapters.errors import CURES, fault
from adapters.inspection.inspect import _FOREIGN
from adapters.inspection.peft_config import REFUSED

ROOT = Path(__file__).parents[3]
OWN = Path(__file__).resolve()


def sources(*folders: str) -> str:
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return "\n".join(path.read_text() for path in paths if path != OWN and path.name != "errors.py")


PRODUCT = sources("adapters", "server")
TESTS = sources("tests/pure", "tests/service", "tests/engine", "tests/support")


def is_named(what: str, text: str) -> bool:
    return re.search(rf"[\"\']{re.escape(what)}[\"\']", text) is not None


@pytest.mark.parametrize("code", CURES)
def test_each_code_has_a_cure_a_place_and_a_test(code: str) -> None:
    refused = fault(code, "What was found.")
    assert (refused.code, refused.message) == (code, f"What was found. {CURES[code]}")
    assert re.match(r"[A-Z].+\.$", CURES[code])
    assert is_named(code, PRODUCT), "nothing is refused with it"
    assert is_named(code, TESTS), "no test is refused with it"


@pytest.mark.parametrize("field", REFUSED)
def test_each_field_that_is_refused_is_tried(field: str) -> None:
    assert REFUSED[field][0] in CURES
    assert re.search(rf"\b{field}\b", TESTS), "no test has an adapter with it"


@pytest.mark.parametrize("part", [part for part, _, _ in _FOREIGN])
def test_each_tensor_of_another_kind_is_tried(part: str) -> None:
    assert part.strip(".") in TESTS

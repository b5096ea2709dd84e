"""What a stranger's JSON may hold, and that sizes are bounded before anything is parsed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from adapters.inspection import strict_json
from adapters.inspection.strict_json import Bounds

BOUNDS = Bounds(max_items=5000, max_nodes=200, max_depth=10, allow_nul=True)
MANY = 10_000


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"messages": [{"role": "user", "content": 'commas, {brackets} and [these], "quoted" \\' * 3000}]},
        {"prompt": list(range(4900))},
        {"prompt": [list(range(2000)), list(range(2000))]},
        {"text": "\0", "float": [0.5] * 100, "n": 2**63},
        {"text": "\\" * 5000 + '"' * 5000},
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_what_is_let_in_is_what_python_reads(value: Any, ascii_only: bool) -> None:
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert strict_json.loads(data, BOUNDS) == value


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[" + b"1," * MANY + b"1]", "more than 5000 items"),
        (b"[" + b"{}," * 300 + b"{}]", "more than 200 lists, objects"),
        (b"[" + b"[]," * 300 + b"[]]", "more than 200 lists, objects"),
        (b"[" * 300, "more than 200 lists, objects"),
        (b"[" + b"1.5," * 900 + b"1]", "fractions"),
        (b"[" + b"1e9," * 900 + b"1]", "fractions"),
        (b'["' + b'","' * (1 << 17) + b'"]', "strings"),
        (b"[" + b"9" * 1000 + b"]", "more than 100 digits"),
        (b"[" + b"1234567890," * 50 + b"1234567890" * 10 + b"1]", "more than 100 digits"),
        (b"{" + b",".join(b'"%d":1' % n for n in range(300)) + b"}", "more than 200 members"),
        (b"[" + b"true," * 300 + b"true]", "more than 200 items that are no token"),
        (b"[" + b"1," * 300 + b"null]", "more than 200 items that are no token"),
        (b"[%d]" % 2**63, "does not fit in 64 bits"),
        (b"[%d]" % (-(2**63) - 1), "does not fit in 64 bits"),
        (b"[" * 12 + b"]" * 12, "nested more than 10"),
        (b'{"a":1,"a":1}', "appears twice"),
        (b'"\\ud800"', "half a surrogate pair"),
        (b'{"\\udfff":1}', "half a surrogate pair"),
        ("[1]".encode("utf-16"), "not UTF-8"),
        (b"NaN", "not a JSON number"),
        (b"1e999", "too large a number"),
    ],
)
def test_what_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        strict_json.loads(data, BOUNDS)


@pytest.mark.parametrize("piece", [b"1,", b"{},", b"[],", b'"",', b"1.5,", b"9" * 500 + b",", b"["])
def test_too_many_are_refused_without_parsing(piece: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json.json, "loads", None)
    with pytest.raises(ValueError, match="more than"):
        strict_json.loads(b"[" + piece * ((4 << 20) // len(piece)), BOUNDS)


def test_too_many_members_are_refused_without_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one object, and in all together; a colon within a text is none."""
    few = {"logit_bias": {f"{n}:::": 1 for n in range(190)}, "text": ":" * 5000}
    assert strict_json.loads(json.dumps(few).encode(), BOUNDS) == few
    monkeypatch.setattr(strict_json.json, "loads", None)
    members = b",".join(b'"%d":1' % n for n in range(150))
    for data in (b"{" + members + b"," + members + b"}", b'{"a":{' + members + b'},"b":{' + members + b"}}"):
        with pytest.raises(ValueError, match="more than 200 members"):
            strict_json.loads(data, BOUNDS)


def test_numbers_of_a_hundred_digits_are_read() -> None:
    value = [int("1" * 100), "2" * 5000, int("3" * 100)]
    data = json.dumps(value).encode()
    assert strict_json.loads(data, Bounds(max_items=5)) == value


def test_a_short_text_with_a_long_number_says_so_in_json_s_words() -> None:
    with pytest.raises(ValueError, match=r"^a number has more than 100 digits$"):
        strict_json.loads(b"9" * 5000, strict_json.Bounds(10_000))

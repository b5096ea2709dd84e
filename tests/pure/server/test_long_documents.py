"""What is written in slices is the same JSON, and no slice is long."""

from __future__ import annotations

import asyncio
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from server.errors import Internal
from server.inference import long_documents
from server.inference.long_documents import LONG, PART_BYTES, SLICE, dumped, is_long, slices, written

documents = some.dictionaries(
    some.text(max_size=3),
    some.recursive(
        some.none() | some.booleans() | some.integers() | some.floats(allow_nan=False, allow_infinity=False),
        lambda inner: some.lists(inner, max_size=9) | some.dictionaries(some.text(max_size=2), inner),
        max_leaves=30,
    ),
)


@settings(max_examples=60)
@given(documents)
def test_slices_are_the_same_json(document: dict[str, object]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_documents, "SLICE", 5)
        assert "".join(slices(document)) == dumped(document)


def embeddings(inputs: int, numbers: int) -> dict[str, object]:
    rows = [{"index": i, "object": "embedding", "embedding": [i / 7] * numbers} for i in range(inputs)]
    return {"object": "list", "data": rows, "model": "a", "usage": {"prompt_tokens": 3}}


@pytest.mark.parametrize(
    "document",
    [
        embeddings(40, 1024),
        embeddings(3, 9 * SLICE),
        embeddings(6 * SLICE, 1),
        {"data": [{"embedding": "x" * 5464}] * 2048},
        {"choices": [{"logprobs": {"top_logprobs": [None] + [{str(i): 0.5 for i in range(20)}] * 2000}}]},
    ],
)
def test_no_slice_is_long(document: dict[str, object]) -> None:
    assert is_long(document)
    pieces = list(slices(document))
    assert max(piece.count(",") for piece in pieces) <= 1.1 * SLICE
    assert max(map(len, pieces)) < 1 << 20
    parts = asyncio.run(written(document))
    assert json.loads(b"".join(parts)) == document
    assert {len(part) for part in parts[:-1]} <= {PART_BYTES}


def test_short_ones_are_no_long_ones() -> None:
    assert not is_long({"data": [{"embedding": [1.0] * (LONG // 2)}]})


def test_what_is_no_number_is_said_to_be_none() -> None:
    with pytest.raises(Internal, match="not a number"):
        asyncio.run(written({"data": [math.nan]}))

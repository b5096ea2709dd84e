"""What gateways and replicas say to each other survives the way, in whatever pieces it comes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from adapters.errors import AdapterQuarantined, AdapterUnavailable
from adapters.model import Version
from server import errors
from server.fleet import wire
from server.fleet.wire import Chunk, End, Frames, Granted, Kind, Malformed, WireOrder
from tests.support.world import tenant

chunks = some.builds(
    Chunk,
    some.booleans(),
    *(some.integers(0, 2**32 - 1),) * 3,
    some.lists(some.integers(0, 2**32 - 1), max_size=8).map(tuple),
    some.text(some.characters(exclude_categories=["Cs"])),
)


@given(some.lists(chunks, max_size=5), some.integers(1, 40))
def test_frames_come_in_any_pieces(sent: list[Chunk], size: int) -> None:
    raw = b"".join(one.encoded() for one in sent)
    frames, found = Frames(), []
    for at in range(0, len(raw), size):
        found += frames.feed(raw[at : at + size])
    assert [kind for kind, _ in found] == [Kind.CHUNK] * len(sent)
    assert [Chunk.decoded(payload) for _, payload in found] == sent


def test_a_frame_is_bounded_and_of_a_known_kind() -> None:
    with pytest.raises(wire.Oversized):
        Frames().feed(b"\xff\xff\xff\xff\x04")
    with pytest.raises(Malformed):
        Frames().feed(b"\0\0\0\0\x63")


def test_a_large_frame_in_small_pieces_is_put_together_once() -> None:
    """All that waits, copied with every piece, would be 50 GB here."""
    payload = bytes(20 << 20)
    raw, frames, found = wire.frame(Kind.BODY, payload), Frames(), []
    began = time.process_time()
    for at in range(0, len(raw), 4096):
        found += frames.feed(raw[at : at + 4096])
    assert found == [(Kind.BODY, payload)]
    assert time.process_time() - began < 2


def test_an_order_is_the_same_on_the_other_side() -> None:
    version = Version("acme", "a", 3, "d" * 64, Path("/there") / ("d" * 64), 8, 1000, base="f" * 64)
    order = WireOrder(
        id="r1",
        tenant=tenant("acme", weight=2.0, max_queued=3),
        dialect="chat",
        fields={"messages": [{"role": "user", "content": "\ud83d half, and ü"}], "max_tokens": 3},
        version=version,
        public_model="a",
        prompt_bound=9,
        prompt_tokens=7,
        elastic=True,
        granted=Granted(9, 3, True, 2),
        said=[1, 2, 2**31],
        cached=4,
        in_parts=True,
    )
    there = WireOrder.decoded(order.encoded(), Path("/there").joinpath)
    for name in (
        "id",
        "dialect",
        "fields",
        "version",
        "public_model",
        "granted",
        "said",
        "cached",
        "elastic",
        "in_parts",
    ):
        assert getattr(there, name) == getattr(order, name), name
    assert there.version is not None
    assert (there.version.base, there.version.chat) == ("f" * 64, {})
    assert (there.tenant.id, there.tenant.share, there.tenant.max_queued) == ("acme", 2.0, 3)
    assert there.tenant.cache_salt == order.tenant.cache_salt


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b'{"id": 1}', b"\xff"])
def test_what_is_no_order_is_refused(raw: bytes) -> None:
    with pytest.raises(Malformed):
        WireOrder.decoded(raw, Path)


@pytest.mark.parametrize(
    "error",
    [
        errors.TooManyRequests("slowly", code="rate_limit_exceeded", retry_after=3.5),
        errors.BadRequest("no", param="n"),
        errors.Unavailable("later", code="queue_timeout", retry_after=2),
        AdapterUnavailable("not now"),
        AdapterQuarantined("it made NaN"),
    ],
)
def test_an_error_is_the_same_on_the_other_side(error: Exception) -> None:
    there = End.decoded(End(1, 2, 3, "x", None, error).encoded()[5:]).error
    assert type(there) is type(error)
    assert vars(there).items() >= {k: v for k, v in vars(error).items() if v is not None}.items()
    assert errors.status_of(there) == errors.status_of(error)


def test_a_defect_tells_nothing_of_itself() -> None:
    there = End.decoded(End(0, 0, 0, error=KeyError("a secret")).encoded()[5:]).error
    assert isinstance(there, errors.Internal)
    assert "secret" not in there.message


@pytest.mark.parametrize(
    ("granted", "asked", "covers"),
    [
        (Granted(10, 20), (5, 25), True),
        (Granted(10, 20), (11, 20), False),
        (Granted(10, 20, by_cost=True), (5, 25), False),
        (Granted(10, 20, by_cost=True), (10, 20), True),
    ],
)
def test_what_is_granted(granted: Granted, asked: tuple[int, int], covers: bool) -> None:
    assert granted.covers(*asked) is covers


def test_a_piece_of_an_upload() -> None:
    assert wire.piece_of(wire.piece("ä.bin", b"\0\1")[5:]) == ("ä.bin", b"\0\1")

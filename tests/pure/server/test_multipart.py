"""Multipart bodies, whole, in pieces and spoilt."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import BadRequest
from server.http.uploads import boundary_of, parts

FORM = (
    b'--xyz\r\nContent-Disposition: form-data; name="first"; filename="a.json"\r\n'
    b"Content-Type: application/json\r\n\r\n"
    b'{"a": "--xy"}\r\n\r\n-'
    b'\r\n--xyz\r\ncontent-disposition: form-data; filename="x;name=no"; name="second"\r\n\r\n'
    b"\x00\xff\r\n--xy\r"
    b'\r\n--xyz\r\nContent-Disposition: form-data; name="empty"\r\n\r\n'
    b"\r\n--xyz--\r\n"
)
MEANT = {"first": b'{"a": "--xy"}\r\n\r\n-', "second": b"\x00\xff\r\n--xy\r", "empty": b""}


async def in_pieces(body: bytes, cuts: list[int]) -> AsyncIterator[bytes]:
    edges = [0, *sorted(cuts), len(body)]
    for start, end in itertools.pairwise(edges):
        yield body[start:end]


async def read(body: bytes, cuts: list[int] | None = None, boundary: bytes = b"xyz") -> dict[str, bytes]:
    got: dict[str, bytes] = {}
    async for name, piece in parts(in_pieces(body, cuts or []), boundary):
        got[name] = got.get(name, b"") + piece
    return got


async def test_parts_come_whole_and_in_order() -> None:
    assert await read(FORM) == MEANT
    assert list(await read(FORM)) == ["first", "second", "empty"]
    assert await read(FORM, list(range(len(FORM)))) == MEANT, "one byte at a time"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, len(FORM)), max_size=8))
async def test_where_it_is_cut_does_not_matter(cuts: list[int]) -> None:
    assert await read(FORM, cuts) == MEANT


@pytest.mark.parametrize("after", [b"\r\n", b"an epilogue", b"\r\n--xyz\r\n", b"--xyz--\r\n"])
async def test_what_follows_the_end_is_ignored(after: bytes) -> None:
    for cut in range(len(FORM) - 4, len(FORM) + len(after)):
        assert await read(FORM + after, [cut]) == MEANT


async def test_parts_without_end_are_refused() -> None:
    part = b'--xyz\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n'
    with pytest.raises(BadRequest) as refused:
        await read(part * 1000 + b"--xyz--")
    assert refused.value.code == "multipart_invalid"


async def test_what_httpx_sends_is_read() -> None:
    files = {"a": ("ä\"';.json", b"one"), "b": ("b", b"\r\n" * 1000)}
    request = httpx.Request("POST", "http://x", files=files)
    boundary = boundary_of(request.headers["content-type"])
    assert await read(request.read(), boundary=boundary) == {"a": b"one", "b": b"\r\n" * 1000}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(FORM) - 5))
async def test_a_body_that_breaks_off_is_refused(length: int) -> None:
    with pytest.raises(BadRequest) as refused:
        await read(FORM[:length])
    assert refused.value.code == "upload_incomplete"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no multipart at all",
        b"--xyz",
        b"--xyzzy\r\n\r\n",
        b"--xyz\r\nContent-Disposition: form-data\r\n\r\nx\r\n--xyz--\r\n",
        b'--xyz\r\nContent-Disposition: form-data; name=""\r\n\r\nx\r\n--xyz--\r\n',
        b"--xyz\r\nContent-Type: text/plain\r\n\r\nx\r\n--xyz--\r\n",
        b"--xyz\r\n\x00: y\r\n\r\nx\r\n--xyz--\r\n",
        b'--xyz\r\nContent-Disposition: form-data; name="a"\r\nX-Long: ' + b"x" * 9000 + b"\r\n\r\n--xyz--",
        b"--xyz\r\n" + b"x" * 9000 + b": y\r\n\r\n--xyz--",
    ],
)
async def test_what_is_not_a_form_is_refused(body: bytes) -> None:
    for cuts in ([], list(range(0, len(body), 7))):
        with pytest.raises(BadRequest) as refused:
            await read(body, cuts)
        assert refused.value.code in ("multipart_invalid", "upload_incomplete")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=3), st.binary(max_size=20))
async def test_no_body_is_more_than_refused(tail: bytes, cuts: list[int], boundary: bytes) -> None:
    for body in (tail, FORM[:90] + tail, FORM[:220] + tail):
        with contextlib.suppress(BadRequest):
            await read(body, cuts, boundary or b"xyz")


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "application/json",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        "multipart/mixed; boundary=x",
        f"multipart/form-data; boundary={'x' * 300}",
        "text/plain; boundary=x",
        "multipart/form-data; boundary*=utf-8''x",
    ],
)
def test_headers_without_a_boundary_are_refused(header: str | None) -> None:
    with pytest.raises(BadRequest):
        boundary_of(header)


@pytest.mark.parametrize(
    ("header", "boundary"),
    [
        ("multipart/form-data; boundary=abc", b"abc"),
        ('Multipart/Form-Data; charset=utf-8; Boundary="a b\'c"', b"a b'c"),
    ],
)
def test_headers_with_one(header: str, boundary: bytes) -> None:
    assert boundary_of(header) == boundary

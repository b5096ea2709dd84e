"""Where an upload comes from: all of them give the same pieces, (file name, bytes), to ``publish``.

multipart/form-data           two file fields, or one named ``archive``
application/x-tar, gzip, zip  the archive as the body
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from email.message import Message
from pathlib import Path

from fastapi import Request
from multipart import MultipartError, MultipartSegment, PushMultipartParser, StrictParserError

from adapters.inspection.strict_json import show
from adapters.store.archives import unpacked
from server.errors import BadRequest
from server.http.bodies import json_object, limited_body
from server.publishing.fetch import imported

ARCHIVE = "archive"
ARCHIVE_TYPES = frozenset(
    {
        "application/gzip",
        "application/tar",
        "application/tar+gzip",
        "application/x-gzip",
        "application/x-tar",
        "application/x-zip-compressed",
        "application/zip",
    }
)
# Multipart boundaries and part headers around the files.
_ROOM = 64 << 10
_MAX_HEADER = 8 << 10
_MAX_BOUNDARY = 70  # RFC 2046
_MAX_PARTS = 64

Files = AsyncIterator[tuple[str, bytes]]
Counted = Callable[[AsyncIterator[bytes]], AsyncIterator[bytes]]


def files_of(
    request: Request,
    folder: Path,
    *,
    max_bytes: int,
    prefixes: Sequence[str],
    counted: Counted,
) -> Files:
    """The files in the body of ``request``; an archive is kept in ``folder`` while it is read.

    ``counted`` sees the bytes of the body, or of an archive that is fetched, while they come. ``prefixes``
    are the sources that may be fetched; without any, JSON is a body of another kind.
    Raises BadRequest for a body of another kind, at once; then what reading raises.
    """
    header = Message()
    header["content-type"] = request.headers.get("content-type", "")
    if header.get_content_type() in ARCHIVE_TYPES:
        return unpacked(counted(limited_body(request, max_bytes)), folder, max_bytes=max_bytes)
    if prefixes and header.get_content_type() == "application/json":
        return _of_source(request, prefixes, folder, max_bytes, counted)
    boundary = boundary_of(request.headers.get("content-type"))
    body = counted(limited_body(request, max_bytes + _ROOM))
    return _of_form(parts(body, boundary), folder, max_bytes)


async def _of_source(
    request: Request, prefixes: Sequence[str], folder: Path, max_bytes: int, counted: Counted
) -> Files:
    body = await json_object(request)
    source = body.get("source")
    if not isinstance(source, str) or len(body) > 1:
        raise BadRequest('Send {"source": URL} and nothing else.', param="source")
    async for entry in imported(source, prefixes, folder, max_bytes=max_bytes, counted=counted):
        yield entry


async def _of_form(fields: Files, folder: Path, max_bytes: int) -> Files:
    begun: set[str] = set()
    async for name, piece in fields:
        if name != ARCHIVE:
            if not piece:  # every part begins with an empty piece
                if name in begun:
                    raise BadRequest(f"A part named {show(name)} came twice.", code="multipart_invalid")
                begun.add(name)
            yield name, piece
            continue
        async for entry in unpacked(_only_archive(piece, fields), folder, max_bytes=max_bytes):
            yield entry


async def _only_archive(first: bytes, fields: Files) -> AsyncIterator[bytes]:
    yield first
    async for name, piece in fields:
        if name != ARCHIVE or not piece:  # every part begins with an empty piece
            raise BadRequest(f"Send one part named `{ARCHIVE}` and nothing else, or the adapter's files.")
        yield piece


_ADVICE = (
    "Send the files as multipart/form-data, in fields named adapter_config.json and"
    " adapter_model.safetensors, or as a tar or zip in a field named archive."
)


def boundary_of(content_type: str | None, advice: str = _ADVICE) -> bytes:
    """The boundary of a multipart/form-data header. Raises BadRequest with ``advice`` for anything else."""
    header = Message()
    header["content-type"] = content_type or ""
    boundary = header.get_param("boundary")
    is_form = header.get_content_type() == "multipart/form-data"
    if not is_form or not isinstance(boundary, str) or not 1 <= len(boundary) <= _MAX_BOUNDARY:
        raise BadRequest(advice)
    return boundary.encode("latin-1", "replace")


async def parts(body: AsyncIterator[bytes], boundary: bytes) -> AsyncIterator[tuple[str, bytes]]:
    """(field name, bytes) for every piece of every part, in order; each part begins with an empty piece.

    Raises as ``segments``.
    """
    async for part, piece in segments(body, boundary):
        yield _field_of(part), piece


async def segments(
    body: AsyncIterator[bytes], boundary: bytes
) -> AsyncIterator[tuple[MultipartSegment, bytes]]:
    """(part, bytes) for every piece of every part, in order; each part begins with an empty piece.

    Raises BadRequest when the body is not well-formed or ends too early. What follows its end is ignored.
    """
    ended = False
    part: MultipartSegment | None = None
    try:
        parser = PushMultipartParser(
            boundary, max_header_size=_MAX_HEADER, max_segment_count=_MAX_PARTS, strict=True
        )
        async for chunk in body:
            if ended or not chunk:
                continue
            try:
                for event in parser.parse(chunk):
                    if isinstance(event, MultipartSegment):
                        part = event
                        _field_of(part)
                        yield part, b""
                    elif event:
                        assert part is not None
                        yield part, bytes(event)
            except StrictParserError:
                ended = _has_ended(parser)
                if not ended:
                    raise
    except MultipartError as exc:
        raise BadRequest(f"The multipart body is malformed: {exc}", code="multipart_invalid") from exc
    if not _has_ended(parser):
        raise BadRequest("The upload broke off before its end; send it again.", code="upload_incomplete")


def _field_of(part: MultipartSegment) -> str:
    if not part.name:
        raise BadRequest("A part of the upload has no field name.", code="multipart_invalid")
    return str(part.name)


def _has_ended(parser: PushMultipartParser) -> bool:
    """Whether the form is complete. The parser is closed afterwards."""
    try:
        parser.close()
    except MultipartError:
        return False
    return True

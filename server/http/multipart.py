"""A multipart body as a stream of pieces, so that an upload is never held in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from email.message import Message

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser

from server.errors import BadRequest

_MAX_HEADER = 8 << 10
_MAX_BOUNDARY = 70  # RFC 2046


def boundary_of(content_type: str | None) -> bytes:
    """The boundary of a multipart/form-data header. Raises BadRequest for anything else."""
    header = Message()
    header["content-type"] = content_type or ""
    boundary = header.get_param("boundary")
    is_form = header.get_content_type() == "multipart/form-data"
    if not is_form or not isinstance(boundary, str) or not 1 <= len(boundary) <= _MAX_BOUNDARY:
        raise BadRequest(
            "Send the files as multipart/form-data, in fields named adapter_config.json and"
            " adapter_model.safetensors, or as a tar or zip in a field named archive."
        )
    return boundary.encode("latin-1", "replace")


async def parts(body: AsyncIterator[bytes], boundary: bytes) -> AsyncIterator[tuple[str, bytes]]:
    """(field name, bytes) for every piece of every part, in order; an empty part gives one empty piece.

    Raises BadRequest when the body is not well-formed or ends too early.
    """
    reader = _Reader()
    parser = MultipartParser(boundary, reader.callbacks())  # type: ignore[arg-type]
    try:
        async for chunk in body:
            parser.write(chunk)
            while reader.pieces:
                yield reader.pieces.popleft()
    except MultipartParseError as exc:
        raise BadRequest(f"The multipart body is malformed: {exc}", code="multipart_invalid") from exc
    if not reader.ended:
        raise BadRequest("The upload broke off before its end; send it again.", code="upload_incomplete")


class _Reader:
    """The parser's callbacks; collects what one chunk of the body completes."""

    def __init__(self) -> None:
        self.pieces: deque[tuple[str, bytes]] = deque()
        self.ended = False
        self._field = ""
        self._name = bytearray()
        self._value = bytearray()

    def callbacks(self) -> dict[str, object]:
        return {
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_begin": self._on_part_begin,
            "on_part_data": self._on_part_data,
            "on_end": self._on_end,
        }

    def _on_part_begin(self) -> None:
        self._field = ""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._grow(self._name, data[start:end])

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._grow(self._value, data[start:end])

    def _on_header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            header = Message()
            header["content-disposition"] = self._value.decode("latin-1")
            name = header.get_param("name", header="content-disposition")
            self._field = name if isinstance(name, str) else ""
        self._name.clear()
        self._value.clear()

    def _on_headers_finished(self) -> None:
        if not self._field:
            raise BadRequest("A part of the upload has no field name.", code="multipart_invalid")
        self.pieces.append((self._field, b""))

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self.pieces.append((self._field, data[start:end]))

    def _on_end(self) -> None:
        self.ended = True

    @staticmethod
    def _grow(buffer: bytearray, data: bytes) -> None:
        if len(buffer) + len(data) > _MAX_HEADER:
            raise BadRequest("A part of the upload has too long a header.", code="multipart_invalid")
        buffer.extend(data)

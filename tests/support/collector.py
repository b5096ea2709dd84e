"""A collector of traces: what OTLP over HTTP sends, as OpenTelemetry's own messages read it."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


@dataclass(frozen=True)
class SpanSeen:
    """Times are in seconds since 1970; ids are in hexadecimal."""

    name: str
    trace: str
    id: str
    parent: str
    began: float
    ended: float
    failed: bool
    attributes: dict[str, Any]
    service: dict[str, Any]

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class Collector:
    """``url`` is where traces are sent to."""

    def __init__(self) -> None:
        self.spans: list[SpanSeen] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.path == "/v1/traces"
                outer.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.end_headers()
                self.wfile.write(ExportTraceServiceResponse().SerializeToString())

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def take(self, sent: Any) -> None:
        for of in sent.resource_spans:
            service = _values(of.resource.attributes)
            for scope in of.scope_spans:
                self.spans += [
                    SpanSeen(
                        span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(),
                        span.start_time_unix_nano / 1e9, span.end_time_unix_nano / 1e9,
                        span.status.code == 2, _values(span.attributes), service,
                    )
                    for span in scope.spans
                ]  # fmt: skip

    def of(self, trace: str, until: str, seconds: float = 120) -> dict[str, SpanSeen]:
        """The spans of a trace by name, once one named ``until`` is there."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            found = {span.name: span for span in self.spans if span.trace == trace}
            if until in found:
                return found
            time.sleep(0.05)
        raise AssertionError(f"no span {until!r} came: {[span.name for span in self.spans]}")


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


@contextmanager
def collector() -> Iterator[Collector]:
    made = Collector()
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.server.shutdown()
        made.server.server_close()
        thread.join()

"""Spans for a trace store, by OTLP over HTTP: the only file that imports OpenTelemetry.

It is imported where ``LORAPLEX_TRACES_URL`` is set.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PROPAGATOR = TraceContextTextMapPropagator()


class OneSpan:
    """``server.telemetry.spans.Trace``."""

    def __init__(self, traces: Traces, span: Span) -> None:
        self._traces = traces
        self._span = span

    @property
    def traceparent(self) -> str:
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(self._span, Context()))
        return carrier["traceparent"]

    @property
    def is_kept(self) -> bool:
        return self._span.is_recording()

    def child(self, name: str, began: float, attributes: Mapping[str, Any] | None = None) -> OneSpan:
        inside = trace.set_span_in_context(self._span, Context())
        return OneSpan(self._traces, self._traces.start(name, inside, SpanKind.INTERNAL, began, attributes))

    def end(
        self,
        ended: float,
        attributes: Mapping[str, Any] | None = None,
        error: str | None = None,
        name: str | None = None,
    ) -> None:
        if name is not None:
            self._span.update_name(name)
        self._span.set_attributes({name: v for name, v in (attributes or {}).items() if v is not None})
        if error is not None:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end(_ns(ended))


class _Share(Sampler):
    """A share of all traces that may be changed while they come."""

    def __init__(self, share: float) -> None:
        self.of = TraceIdRatioBased(share)

    def should_sample(self, *given: Any, **named: Any) -> SamplingResult:
        return self.of.should_sample(*given, **named)

    def get_description(self) -> str:
        return self.of.get_description()


class Traces:
    """Sends spans to ``url`` (``/v1/traces`` is added), of a ``share`` of the traces that begin here.

    Of traces that begin elsewhere those are kept that their beginner keeps. Sending happens in a thread; a
    store that does not answer costs spans and nothing else.
    """

    def __init__(self, url: str, share: float, about: Mapping[str, str]) -> None:
        self._share = _Share(share)
        self._provider = TracerProvider(
            sampler=ParentBased(self._share),
            resource=Resource.create({"service.name": "loraplex", **about}),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint=f"{url.rstrip('/')}/v1/traces", timeout=5)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
        self._tracer = self._provider.get_tracer("loraplex")

    def begin(self, name: str, given: str | None, at: float) -> OneSpan:
        """What is done for a request; ``given`` is its ``traceparent``."""
        inside = _PROPAGATOR.extract({"traceparent": given} if given else {}, Context())
        return OneSpan(self, self.start(name, inside, SpanKind.SERVER, at, None))

    def start(
        self, name: str, inside: Context, kind: SpanKind, at: float, attributes: Mapping[str, Any] | None
    ) -> Span:
        """A span of the trace that ``inside`` holds."""
        given = {name: v for name, v in (attributes or {}).items() if v is not None}
        return self._tracer.start_span(name, inside, kind, given, start_time=_ns(at))

    def keep(self, share: float) -> None:
        """Of the traces that begin here from now on."""
        self._share.of = TraceIdRatioBased(share)

    async def close(self) -> None:
        """Sends what is left; takes seconds at most."""
        await asyncio.to_thread(self._provider.shutdown)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)

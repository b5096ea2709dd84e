"""What each adapter's version did, and which are loaded, for as many versions as there may be labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from adapters.model import Version
from server.telemetry.series import Form, counter, gauge, summary

OTHER = ("other", "other", "other")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A version in host memory (``cpu``) or in a slot (``gpu``)."""

    version: Version
    level: str
    pinned: bool

    def labels(self) -> dict[str, str]:
        """Those of vLLM's metric; the name is as people and routers name it: ``tenant/adapter@3``."""
        name = f"{self.version.tenant}/{self.version.adapter}@{self.version.number}"
        return {"adapter_name": name, "level": self.level, "pinned": str(self.pinned).lower()}


class Ended(Protocol):
    """What a request's lease knows at its end; see ``server.scheduling.lease.Lease``."""

    version: Version | None
    prompt_tokens: int
    output_tokens: int
    queued_for: float
    load_seconds: float
    first_token_after: float | None


class ByAdapter:
    """Written once per request, at its end. Versions beyond ``bound`` share the label ``other``."""

    def __init__(self, bound: int) -> None:
        labels = ("tenant", "adapter", "version")
        self.bound = bound
        self._known: set[tuple[str, str, str]] = set()
        self._requests = counter(
            "loraplex_adapter_requests", "Requests of a version, by how they ended.", *labels, "outcome"
        )
        self._prompt = counter("loraplex_adapter_prompt_tokens", "Their prompt tokens.", *labels)
        self._output = counter("loraplex_adapter_output_tokens", "Their output tokens.", *labels)
        self._cold = counter(
            "loraplex_adapter_cold_requests", "Those that waited for their adapter to be loaded.", *labels
        )
        self._queue = summary("loraplex_adapter_queue_seconds", "Until the engine took them.", *labels)
        self._first = summary("loraplex_adapter_first_token_seconds", "Until their first token.", *labels)

    def ended(self, request: Ended, outcome: str) -> None:
        """A request for a version had its outcome; nothing of one for the base, or of an upload's probes."""
        if not self.bound or request.version is None or not request.version.number:
            return
        of = self.label(request.version)
        self._requests.labels(*of, outcome).inc()
        self._prompt.labels(*of).inc(request.prompt_tokens)
        self._output.labels(*of).inc(request.output_tokens)
        self._queue.labels(*of).observe(request.queued_for)
        self._cold.labels(*of).inc(1 if request.load_seconds > 0 else 0)
        if request.first_token_after is not None:
            self._first.labels(*of).observe(request.first_token_after)

    def label(self, version: Version) -> tuple[str, str, str]:
        """(tenant, adapter, version), or ``other`` three times once there are as many as there may be."""
        of = version.tenant, version.adapter, str(version.number)
        if of in self._known:
            return of
        if len(self._known) < self.bound:
            self._known.add(of)
            return of
        return OTHER

    def page(self, form: Form, loaded: Sequence[Loaded]) -> Iterator[str]:
        """Their part of the page, with vLLM's coming names for what is ``loaded``, slots first."""
        if not self.bound:
            return
        for family in (self._requests, self._prompt, self._output, self._cold, self._queue, self._first):
            yield from family.page(form)
        ordered = sorted(loaded, key=lambda one: one.level != "gpu")
        yield gauge(
            "vllm:lora_adapter_loaded",
            "Adapters in a GPU slot (gpu), or in host memory alone (cpu).",
            ((one.labels(), 1.0) for one in ordered[: self.bound]),
        )

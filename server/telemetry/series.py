"""Counters, histograms and gauges with many labels, and their text for Prometheus.

prometheus_client takes 400 ms of the event loop for a page of 1,000 customers. Here a series keeps its lines
until it changes, so that a page costs what has changed since the last one. All of it on the event loop.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, Literal, TypeVar

Form = Literal["text", "openmetrics"]
# Where a number was measured: the id of a trace, the number, and when, in seconds since 1970.
Exemplar = tuple[str, float, float]

_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


def escaped(text: str) -> str:
    """A label's value between its quotes."""
    return text.translate(_ESCAPES)


class Count:
    """One counter."""

    __slots__ = ("_labels", "_lines", "_name", "_value")

    def __init__(self, name: str, labels: str) -> None:
        self._name, self._labels = name, labels
        self._value = 0.0
        self._lines: str | None = None

    def inc(self, amount: float = 1.0) -> None:
        """By ``amount``, at least 0."""
        self._value += amount
        self._lines = None

    def lines(self, form: Form) -> str:
        """Cached until it changes; the same in both forms."""
        if self._lines is None:
            labels = f"{{{self._labels}}}" if self._labels else ""
            self._lines = f"{self._name}_total{labels} {self._value!r}\n"
        return self._lines


class Distribution:
    """One histogram, with the newest exemplar of each bucket; without bounds a sum and a count alone."""

    __slots__ = ("_bounds", "_counts", "_exemplars", "_heads", "_lines", "_sum", "_tails")

    def __init__(self, name: str, labels: str, bounds: Sequence[float] = ()) -> None:
        comma = f"{labels}," if labels else ""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        shown = [*(repr(float(bound)) for bound in bounds), "+Inf"] if bounds else []
        self._heads = [f'{name}_bucket{{{comma}le="{bound}"}} ' for bound in shown]
        own = f"{{{labels}}}" if labels else ""
        self._tails = (f"{name}_count{own} ", f"{name}_sum{own} ")
        self._lines: dict[Form, str] = {}
        self._exemplars: dict[int, Exemplar] = {}

    def observe(self, value: float, trace: str | None = None) -> None:
        """``trace`` is the id of the trace that it was measured in."""
        bucket = bisect_left(self._bounds, value)
        self._counts[bucket] += 1
        self._sum += value
        if trace is not None:
            self._exemplars[bucket] = trace, value, time.time()
        if self._lines:
            self._lines = {}

    def lines(self, form: Form) -> str:
        """Cached until it changes."""
        if form not in self._lines:
            self._lines[form] = "".join(self._written(form))
        return self._lines[form]

    def _written(self, form: Form) -> Iterator[str]:
        total = 0
        for bucket, count in enumerate(self._counts):
            total += count
            if self._heads:
                yield f"{self._heads[bucket]}{total}.0{self._exemplar(bucket) if form != 'text' else ''}\n"
        yield f"{self._tails[0]}{total}.0\n{self._tails[1]}{self._sum!r}\n"

    def _exemplar(self, bucket: int) -> str:
        found = self._exemplars.get(bucket)
        return f' # {{trace_id="{escaped(found[0])}"}} {found[1]!r} {found[2]:.3f}' if found else ""


S = TypeVar("S", Count, Distribution)


class Family(Generic[S]):
    """All series of one name. A family without labels has its one series from the start."""

    def __init__(
        self, kind: str, name: str, help_: str, labels: Sequence[str], make: Callable[[str, str], S]
    ) -> None:
        self._kind, self._name, self._help = kind, name, help_
        self._labels = labels
        self._make: Callable[[str, str], S] = make
        self._series: dict[tuple[str, ...], S] = {}
        if not labels:
            self.labels()

    def labels(self, *values: str) -> S:
        """The series with these values; made when it is asked for the first time."""
        found = self._series.get(values)
        if found is None:
            pairs = sorted(zip(self._labels, values, strict=True))  # as prometheus_client has them
            shown = ",".join(f'{name}="{escaped(value)}"' for name, value in pairs)
            found = self._series[values] = self._make(self._name, shown)
        return found

    def __len__(self) -> int:
        return len(self._series)

    def page(self, form: Form) -> Iterator[str]:
        """Its part of the page."""
        name = f"{self._name}_total" if self._kind == "counter" and form == "text" else self._name
        yield head(name, self._kind, self._help)
        for series in self._series.values():
            yield series.lines(form)


def counter(name: str, help_: str, *labels: str) -> Family[Count]:
    """Its samples have ``_total`` at the end of ``name``."""
    return Family("counter", name, help_, labels, Count)


def histogram(name: str, help_: str, *labels: str, buckets: Sequence[float]) -> Family[Distribution]:
    """``buckets`` are upper bounds, in order and without infinity."""
    bounds = tuple(float(bound) for bound in buckets)
    return Family("histogram", name, help_, labels, lambda n, shown: Distribution(n, shown, bounds))


def summary(name: str, help_: str, *labels: str) -> Family[Distribution]:
    """A sum and a count."""
    return Family("summary", name, help_, labels, Distribution)


def head(name: str, kind: str, help_: str) -> str:
    """What stands above the samples of a name."""
    return f"# HELP {name} {help_}\n# TYPE {name} {kind}\n"


def gauge(name: str, help_: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> str:
    """A gauge as it is at the moment of the page."""
    lines = [head(name, "gauge", help_)]
    for labels, value in samples:
        shown = ",".join(f'{label}="{escaped(of)}"' for label, of in labels.items())
        lines.append(f"{name}{{{shown}}} {float(value)!r}\n" if shown else f"{name} {float(value)!r}\n")
    return "".join(lines)

"""``probes.json``: log-probabilities that the training side computed, for the server to check itself against.

    {"tolerance": 0.5,
     "probes": [{"prompt": "The sky" or [464, 6766], "log_probs": [-7.2]}]}

``log_probs`` are those of the prompt's own tokens in nats, each given the tokens before it; the first token
of a prompt has none. ``loraplex probes make`` writes the file.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adapters.errors import AdapterRejected, fault
from adapters.inspection.strict_json import Bounds, loads, show
from adapters.model import PROBES_FILE

MAX_BYTES = 1 << 20
MAX_PROBES = 64
# Of all prompts together: what a long request takes.
MAX_TOKENS = 8192
# For a server that computes in bfloat16, whose rounding moves unlikely tokens by 0.3; an adapter moves some
# by ten times that. In float32 0.01 is enough.
TOLERANCE = 0.5


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class GoldenProbe(_Strict):
    """``text`` is for people."""

    prompt: Annotated[str, Field(min_length=1)] | list[Annotated[int, Field(ge=0, lt=1 << 31)]]
    log_probs: list[Annotated[float, Field(le=1e-3)]] = Field(min_length=1)
    text: str | None = None

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if isinstance(self.prompt, list) and len(self.prompt) != len(self.log_probs) + 1:
            raise ValueError("there must be a log-probability for every token of the prompt but the first")
        return self


class Golden(_Strict):
    """``tolerance`` is the largest difference in a log-probability that still counts as the same."""

    tolerance: float = Field(TOLERANCE, gt=0, le=10)
    probes: list[GoldenProbe] = Field(min_length=1, max_length=MAX_PROBES)

    @model_validator(mode="after")
    def _is_short(self) -> Self:
        tokens = sum(len(probe.log_probs) + 1 for probe in self.probes)
        if tokens > MAX_TOKENS:
            raise ValueError(f"the prompts have {tokens} tokens together, and at most {MAX_TOKENS} may be")
        return self

    def compare(self, found: Sequence[Sequence[float]]) -> Agreement:
        """``found`` are the server's log-probabilities, finite, one list for each probe."""
        bits = digest_of(found)
        worst = Agreement(self, 0, 0, 0.0, 0.0, bits)
        for number, (probe, here) in enumerate(zip(self.probes, found, strict=True)):
            if len(here) != len(probe.log_probs):
                raise _refuse(
                    "probe_mismatch",
                    f"the server reads prompt {number}, {show(probe.prompt)}, as {len(here) + 1} tokens, and"
                    f" the log-probabilities are of {len(probe.log_probs) + 1}; token ids leave no doubt.",
                )
            for at, (served, trained) in enumerate(zip(here, probe.log_probs, strict=True), start=1):
                if abs(served - trained) > worst.difference:
                    worst = Agreement(self, number, at, served, trained, bits)
        return worst


@dataclass(frozen=True, slots=True)
class Agreement:
    """Where server and training side differ most: at token ``at`` (from 0) of prompt ``number`` (from 0).

    ``bits`` is a digest of all that the server said, which is another one where a single bit is.
    """

    golden: Golden
    number: int
    at: int
    served: float
    trained: float
    bits: str = ""

    @property
    def difference(self) -> float:
        return abs(self.served - self.trained)

    @property
    def matches(self) -> bool:
        return self.difference <= self.golden.tolerance

    def as_json(self) -> dict[str, Any]:
        return {
            "matches": self.matches,
            "prompts": len(self.golden.probes),
            "tolerance": self.golden.tolerance,
            "largest_difference": self.difference,
            "worst_prompt": self.number,
        }

    def agreed(self) -> dict[str, Any]:
        """The report; AdapterRejected (``probe_mismatch``) if it says no."""
        if self.matches:
            return self.as_json()
        prompt = self.golden.probes[self.number].prompt
        raise _refuse(
            "probe_mismatch",
            f"token {self.at} of prompt {self.number}, {show(prompt)}, has the log-probability"
            f" {self.served:.4g} here and {self.trained:.4g} there: they differ by {self.difference:.3g}, and"
            f" the tolerance is {self.golden.tolerance:g}.",
        )


def digest_of(found: Sequence[Sequence[float]]) -> str:
    """Of log-probabilities, one list for each prompt, to the last bit."""
    digest = hashlib.sha256()
    for one in found:
        digest.update(struct.pack(f"<q{len(one)}d", len(one), *one))
    return digest.hexdigest()[:32]


def held_exactly(
    report: Mapping[str, Any], bits: str, earlier: Mapping[str, Any] | None, here: Mapping[str, Any]
) -> dict[str, Any]:
    """``report`` of an engine whose answers have the same bits in any batch: they must be those of before.

    ``earlier`` is the report that is kept of the version; its bits count where the engine was as ``here``,
    and stay what later answers are held against. ``identical`` is None where nothing was kept.
    """
    before = None
    if earlier is not None and earlier.items() >= here.items():
        before = earlier.get("bits")
    identical = None if before is None else before == bits
    matches = bool(report["matches"]) and identical is not False
    return {**report, **here, "matches": matches, "bits": before or bits, "identical": identical}


def take(folder: Path) -> Golden | None:
    """Reads ``probes.json`` and removes it: it is no part of what the engine loads.

    AdapterRejected (``probes_invalid``). Synchronous.
    """
    path = folder / PROBES_FILE
    if not path.exists():
        return None
    if path.stat().st_size > MAX_BYTES:
        raise _refuse("probes_invalid", f"it has more than {MAX_BYTES} bytes.")
    golden = parse(path.read_bytes())
    path.unlink()
    return golden


def parse(data: bytes) -> Golden:
    """AdapterRejected (``probes_invalid``)."""
    try:
        return Golden.model_validate(loads(data, Bounds(4 * MAX_TOKENS)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise _refuse(
            "probes_invalid", f"{where}: {first['msg']}." if where else f"{first['msg']}."
        ) from None
    except ValueError as error:
        raise _refuse("probes_invalid", f"{error}.") from None


def _refuse(code: str, message: str) -> AdapterRejected:
    return fault(code, f"{PROBES_FILE}: {message}", param=PROBES_FILE)

"""The inspection of an upload, offline: what a server of the same base would say to a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adapters.errors import AdapterRejected
from adapters.inspection.admit import admit
from adapters.model import BaseModel, Manifest


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Either ``manifest``, or ``error``: why the upload would be refused."""

    base: BaseModel
    manifest: Manifest | None = None
    error: AdapterRejected | None = None

    def as_json(self) -> dict[str, Any]:
        """As JSON; ``report`` is what the server would answer, ``error`` what it would refuse with."""
        error = self.error
        return {
            "ok": error is None,
            "base": {
                "name": self.base.name,
                "fingerprint": self.base.fingerprint,
                "modules": len(self.base.modules),
            },
            "report": self.manifest.as_json() if self.manifest else None,
            "error": {"code": error.code, "message": error.message, "param": error.param} if error else None,
        }


def diagnose(folder: Path, base: BaseModel, *, serving_dtype: str | None = None) -> Diagnosis:
    """What would become of an upload of ``folder``, which stays as it is. Raises OSError."""
    try:
        with TemporaryDirectory(prefix="loraplex-doctor-") as scratch:
            return Diagnosis(base, admit(folder, base, into=Path(scratch), serving_dtype=serving_dtype))
    except AdapterRejected as error:
        return Diagnosis(base, error=error)

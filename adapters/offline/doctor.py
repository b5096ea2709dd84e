"""The inspection of an upload, offline: what a server of the same base would say to a folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adapters.errors import AdapterRejected
from adapters.inspection.convert import plan
from adapters.inspection.inspect import inspect
from adapters.model import BaseModel, Manifest


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Either ``manifest``, or ``error``: why the upload would be refused."""

    base: BaseModel
    manifest: Manifest | None = None
    error: AdapterRejected | None = None

    def report(self) -> dict[str, Any]:
        """As JSON; ``report`` is what the server would answer, ``error`` what it would refuse with."""
        error = self.error
        return {
            "ok": error is None,
            "base": {
                "name": self.base.name,
                "fingerprint": self.base.fingerprint,
                "modules": len(self.base.modules),
            },
            "report": self.manifest.report() if self.manifest else None,
            "error": {"code": error.code, "message": error.message, "param": error.param} if error else None,
        }


def diagnose(folder: Path, base: BaseModel, *, serving_dtype: str | None = None) -> Diagnosis:
    """What would become of an upload of ``folder``, which stays as it is. Raises OSError."""
    try:
        conversion = plan(folder, base)
        if conversion is None:
            return Diagnosis(base, inspect(folder, base, serving_dtype=serving_dtype))
        with TemporaryDirectory(prefix="loraplex-doctor-") as scratch:
            conversion.write(folder, Path(scratch))
            manifest = inspect(Path(scratch), base, serving_dtype=serving_dtype)
        return Diagnosis(base, replace(manifest, conversions=conversion.notes))
    except AdapterRejected as error:
        return Diagnosis(base, error=error)

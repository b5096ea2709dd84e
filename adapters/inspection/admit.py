"""An upload -> Manifest: converted where that makes it faithful, then inspected as it will be served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.inspection.convert import Conversion, plan
from adapters.inspection.inspect import inspect
from adapters.model import NOTHING_WAIVED, BaseModel, Manifest, Waivers


def admit(
    folder: Path,
    base: BaseModel,
    *,
    original_digest: str | None = None,
    serving_dtype: str | None = None,
    into: Path | None = None,
    waived: Waivers = NOTHING_WAIVED,
) -> Manifest:
    """The manifest of the adapter in ``folder``, whose ``conversions`` say what was rewritten, if anything.

    A conversion writes the two files into the folder ``into``; without it, it replaces those in ``folder``.
    ``original_digest`` names the files as the client sent them, for a manifest of converted ones. The other
    arguments are those of ``inspect``. Synchronous: call it in a thread. Raises AdapterRejected, and OSError
    when the disk fails; the caller then throws away what is in ``into``, or in ``folder``.
    """
    options: Any = {"serving_dtype": serving_dtype, "waived": waived}
    found = plan(folder, base)
    if not isinstance(found, Conversion):
        return inspect(folder, base, upload=found, **options)
    into = into or folder
    found.write(folder, into)
    manifest = inspect(into, base, **options)
    return replace(manifest, conversions=found.notes, original_digest=original_digest)

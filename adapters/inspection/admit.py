"""An upload -> Manifest: converted where that makes it faithful, then inspected as it will be served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from adapters.inspection.convert import plan
from adapters.inspection.inspect import inspect
from adapters.model import BaseModel, Manifest


def admit(
    folder: Path,
    base: BaseModel,
    *,
    original_digest: str | None = None,
    serving_dtype: str | None = None,
    any_base: bool = False,
    allow_no_effect: bool = False,
) -> Manifest:
    """The manifest of ``folder``, whose two files are rewritten if ``conversions`` says so.

    The other arguments are those of ``inspect``. Synchronous: call it in a thread. Raises AdapterRejected,
    and OSError when the disk fails; the folder is then to be thrown away.
    """
    conversion = plan(folder, base)
    if conversion is not None:
        conversion.write(folder, folder)
    manifest = inspect(
        folder, base, serving_dtype=serving_dtype, any_base=any_base, allow_no_effect=allow_no_effect
    )
    if conversion is None:
        return manifest
    return replace(manifest, conversions=conversion.notes, original_digest=original_digest)

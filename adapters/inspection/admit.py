"""An upload -> Manifest: converted where that makes it faithful, then inspected as it will be served."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.inspection import dora, trained_rows
from adapters.inspection.convert import Conversion, plan
from adapters.inspection.inspect import Upload, check_tensors, inspect, read_upload
from adapters.inspection.tensor_stats import one_thread
from adapters.model import CONFIG_FILE, NOTHING_WAIVED, WEIGHTS_FILE, BaseModel, Manifest, Waivers


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
    into = into or folder
    with one_thread():
        rows = trained_rows.rewrite(folder, base, into)
    folder = into if rows else folder
    found = plan(folder, base)
    notes: tuple[str, ...] = (dora.NOTE,)
    if isinstance(found, Conversion):
        found.write(folder, into)
        if found.magnitudes:
            _complete(into, read_upload(into, base), base, into)
        notes = (*rows, *found.notes, *((dora.NOTE,) if found.magnitudes else ()))
    elif found.config.dora:
        _complete(folder, found, base, into)
    elif rows:
        notes = rows
    else:
        return inspect(folder, base, upload=found, **options)
    manifest = inspect(into, base, **options)
    return replace(manifest, conversions=notes, original_digest=original_digest)


def _complete(folder: Path, upload: Upload, base: BaseModel, into: Path) -> None:
    """Writes both files of a DoRA into ``into``, with what it needs of the base's weights."""
    pairs = check_tensors(upload.tensors, upload.config, base)
    layers = {
        module: dora.Layer(
            pair.a_name, pair.b_name, upload.config.scaling_of(module), base.modules[module].out_features
        )
        for module, pair in pairs.items()
    }
    with one_thread():
        dora.complete(folder / WEIGHTS_FILE, upload.tensors, layers, base, into / WEIGHTS_FILE)
    if into != folder:
        shutil.copyfile(folder / CONFIG_FILE, into / CONFIG_FILE)

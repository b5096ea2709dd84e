"""An adapter's file written anew: tensors of the old one as they lie there, and others beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from adapters.inspection.safetensors_header import ITEM_BYTES, TensorHeader, read_entries, write_header


def write_beside(
    path: Path,
    kept: Mapping[str, TensorHeader],
    added: Mapping[str, torch.Tensor],
    into: Path,
    **metadata: str,
) -> None:
    """Writes the tensors ``kept`` of the file ``path``, then ``added``, to ``into``, which may be ``path``.

    The file appears under its name when it is on disk, and never in part. Raises OSError.
    """
    headers, at = {}, 0
    for name, tensor in kept.items():
        size = tensor.elements * ITEM_BYTES[tensor.dtype]
        headers[name] = TensorHeader(tensor.dtype, tensor.shape, at, at + size)
        at += size
    for name, values in added.items():
        dtype = str(values.dtype).removeprefix("torch.")
        headers[name] = TensorHeader(dtype, tuple(values.shape), at, at + values.nbytes)
        at += values.nbytes
    partial = into.with_name(f".{into.name}.part")
    try:
        with path.open("rb") as source, partial.open("xb") as file:
            write_header(file, headers, **metadata)
            data, entries = read_entries(source.fileno())
            for name in kept:
                source.seek(data + entries[name].begin)
                file.write(source.read(entries[name].end - entries[name].begin))
            for values in added.values():
                file.write(values.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            file.flush()
            os.fchmod(file.fileno(), 0o444)
            os.fsync(file.fileno())
        partial.rename(into)
    finally:
        partial.unlink(missing_ok=True)

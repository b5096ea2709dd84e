"""The header of a safetensors file: read and checked in full, read as it is, and written.

8 bytes   length of the header, little-endian
header    {"name": {"dtype", "shape", "data_offsets": [begin, end]}, …, "__metadata__": {str: str}}
data      the tensors, back to back
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from adapters.errors import AdapterRejected, fault
from adapters.inspection import strict_json
from adapters.inspection.strict_json import show
from adapters.model import WEIGHTS_FILE

# About 150 bytes a tensor. Every linear layer of a model of 126 layers makes 1,764 tensors, 260 kB.
MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 10_000
MAX_NAME = 512  # characters

# safetensors' name -> (torch's name, bytes per element)
DTYPES = {"F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}
ITEM_BYTES = dict(DTYPES.values())  # by torch's name
FILE_NAMES = {torch_name: name for name, (torch_name, _) in DTYPES.items()}

_ZIP_MAGIC = b"PK\x03\x04"
# What is taken for weights by mistake, by its first bytes.
_OTHERS = (
    (b"version ", "Git LFS's pointer to the weights, not the weights: run `git lfs pull`, and upload again"),
    (b"GGUF", "a GGUF file under another name"),
    (b"<", "a web page, as a failed download leaves it"),
)
_PICKLE_PROTOCOL = 0x80


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """``dtype`` is torch's name for it, ``begin`` and ``end`` count from the start of the data, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """How many numbers the tensor has."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a safetensors file by name; their bytes tile the rest of the file exactly.

    Raises AdapterRejected: ``weights_invalid``, ``weights_not_safetensors``, ``dtype_unsupported``.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= size - 8 or length > MAX_HEADER_BYTES:
                raise _no_header(prefix, length, size)
            data = file.read(length)
    except FileNotFoundError:
        raise _invalid("the file is missing.") from None
    if not data.startswith(b"{"):
        raise _no_header(prefix, length, size)
    entries = _parse(data)
    tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
    _check_tiling(tensors, size - 8 - length)
    return tensors


def read_entries(file: int) -> tuple[int, dict[str, TensorHeader]]:
    """The tensors of the file that is open as descriptor ``file``, in the order of their bytes.

    Returns the byte at which the data begins, and the tensors by name. For files that ``read_header`` has
    accepted, or that are the operator's own: nothing is checked but the header's length. A type that is not
    in ``DTYPES`` keeps the file's name for it. Raises OSError, and ValueError, KeyError or TypeError where
    the file is no safetensors file.
    """
    size = os.fstat(file).st_size
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    if length > size - 8:
        raise ValueError(f"the weights are no safetensors file: a header of {length} bytes in {size}")
    entries = json.loads(os.pread(file, length, 8))
    entries.pop("__metadata__", None)
    tensors = {}
    for name, entry in entries.items():
        dtype, _ = DTYPES.get(entry["dtype"], (entry["dtype"], 0))
        begin, end = entry["data_offsets"]
        tensors[name] = TensorHeader(dtype, tuple(entry["shape"]), begin, end)
    return 8 + length, dict(_by_offset(tensors.items()))


def write_header(file: BinaryIO, tensors: Mapping[str, TensorHeader], **metadata: str) -> None:
    """Writes the length and the header of a file that holds ``tensors``, padded to 8 bytes as they align."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": FILE_NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (tensor.begin, tensor.end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _invalid(message: str) -> AdapterRejected:
    return fault("weights_invalid", f"{WEIGHTS_FILE}: {message}", param=WEIGHTS_FILE)


def _no_header(prefix: bytes, length: int, size: int) -> AdapterRejected:
    if prefix.startswith(_ZIP_MAGIC) or prefix[:1] == bytes([_PICKLE_PROTOCOL]):
        return fault(
            "weights_not_safetensors",
            f"{WEIGHTS_FILE} is a pickle under another name: it begins with {prefix[:4]!r}.",
            param=WEIGHTS_FILE,
        )
    for magic, what in _OTHERS:
        if prefix.startswith(magic):
            return _invalid(f"it is {what}.")
    if len(prefix) < 8:
        return _invalid(f"it has {size} bytes, and the length of its header alone takes 8.")
    if length > MAX_HEADER_BYTES:
        return _invalid(f"its header claims {length} bytes, and at most {MAX_HEADER_BYTES} are read.")
    if not 2 <= length <= size - 8:
        return _invalid(f"its header claims {length} bytes of a file of {size}.")
    return _invalid("its header is not a JSON object.")


def _parse(data: bytes) -> dict[str, Any]:
    try:
        entries = strict_json.loads(data, strict_json.Bounds(16 * MAX_TENSORS))
    except ValueError as error:
        raise _invalid(f"its header is not valid: {error}.") from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _invalid("__metadata__ must map strings to strings.")
    if not 0 < len(entries) <= MAX_TENSORS:
        raise _invalid(f"it holds {len(entries)} tensors; 1 to {MAX_TENSORS} are read.")
    return dict(entries)


def _tensor(name: str, entry: Any) -> TensorHeader:
    if len(name) > MAX_NAME:
        raise _invalid(f"tensor {show(name)} has a name of {len(name)} characters; {MAX_NAME} are read.")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _invalid(f"tensor {show(name)} must have exactly dtype, shape and data_offsets.")
    if not isinstance(entry["dtype"], str):
        raise _invalid(f"tensor {show(name)} has the dtype {show(entry['dtype'])}.")
    if entry["dtype"] not in DTYPES:
        raise fault(
            "dtype_unsupported",
            f"{WEIGHTS_FILE}: tensor {show(name)} has dtype {show(entry['dtype'])},"
            f" and {', '.join(DTYPES)} are served.",
            param=WEIGHTS_FILE,
        )
    dtype, itemsize = DTYPES[entry["dtype"]]
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape):
        raise _invalid(f"tensor {show(name)} has the shape {show(shape)}.")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _invalid(f"tensor {show(name)} has the data_offsets {show(offsets)}.")
    begin, end = offsets
    expected = math.prod(shape) * itemsize
    if end - begin != expected:
        raise _invalid(
            f"tensor {show(name)}, {entry['dtype']} of shape {show(shape)}, takes {show(expected)} bytes,"
            f" and its data_offsets span {end - begin}."
        )
    return TensorHeader(dtype, tuple(shape), begin, end)


def _are_sizes(values: Any) -> bool:
    """A list of at most eight integers in 64 bits; JSON's true is no integer."""
    return (
        isinstance(values, list)
        and len(values) <= 8
        and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
    )


def _check_tiling(tensors: dict[str, TensorHeader], data_bytes: int) -> None:
    at = 0
    for name, tensor in _by_offset(tensors.items()):
        if tensor.begin != at:
            raise _invalid(f"tensor {show(name)} begins at byte {tensor.begin} of the data instead of {at}.")
        at = tensor.end
    if at != data_bytes:
        raise _invalid(f"its tensors take {at} bytes, and the file has {data_bytes} for them.")


def _by_offset(tensors: Iterable[tuple[str, TensorHeader]]) -> list[tuple[str, TensorHeader]]:
    return sorted(tensors, key=lambda item: (item[1].begin, item[1].end))

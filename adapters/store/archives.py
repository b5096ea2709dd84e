"""An adapter's folder as one tar, tar.gz or zip: its known files in pieces, and nothing unpacked.

The archive is kept in a file without a name until it is read, so that a crash leaves nothing. Other files in
it are passed over, whatever their paths; a link under a known file's name, a path to one that leads out, and
whatever would fill memory or disk are refused.
"""

from __future__ import annotations

import errno
import gzip
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from adapters.errors import AdapterRejected, UploadTooLarge, fault
from adapters.inspection.layouts import refuse_foreign, trainer_of
from adapters.inspection.pickles import PICKLES
from adapters.inspection.strict_json import show
from adapters.inspection.unused import unused
from adapters.model import CHAT_FILES, CONFIG_FILE, INITIAL_FILE, PROBES_FILE, WEIGHTS_FILE
from adapters.store.blobs import disk_errors
from adapters.tasks import run_in_thread

MAX_ENTRIES = 10_000  # a folder of TensorBoard's or wandb's has thousands
MAX_ZIP_LISTING = 2 << 20  # of their names; like a tar's extended header it is read in one piece
MAX_LISTING = 1 << 20
_BLOCK = 1 << 20
_SEPARATORS = re.compile(r"[/\\:\0]")
_KNOWN = frozenset({CONFIG_FILE, WEIGHTS_FILE, INITIAL_FILE, PROBES_FILE, *CHAT_FILES, *PICKLES})
_END_OF_ZIP, _END_OF_ZIP64 = b"PK\x05\x06", b"PK\x06\x07"
_UNREADABLE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,  # an encrypted zip
    ValueError,
    struct.error,
)
# Of a place that the archive's own numbers name and no file has; a disk that fails says something else.
_NO_PLACE = frozenset({errno.EINVAL, errno.EOVERFLOW})


async def unpacked(
    body: AsyncIterator[bytes], folder: Path, *, max_bytes: int
) -> AsyncIterator[tuple[str, bytes]]:
    """(file name, piece) of every known file in the archive ``body``, which is kept in ``folder`` meanwhile.

    ``max_bytes`` bounds what the archive holds, files that are passed over too. Raises AdapterRejected
    (``archive_invalid``), UploadTooLarge, StorageFull, StorageFailed, and what ``body`` raises.
    """
    with await run_in_thread(_without_name, folder) as file:
        async for chunk in body:
            await run_in_thread(_write, file, chunk)
        await run_in_thread(file.seek, 0)
        entries = read(file, max_bytes=max_bytes)
        while (entry := await run_in_thread(_next, entries)) is not None:
            yield entry


def read(file: IO[bytes], *, max_bytes: int) -> Iterator[tuple[str, bytes]]:
    """``unpacked``, of an open file and at once.

    The archive is read twice: the first time to find the adapter's folder, see ``_chosen``. Of pickled
    weights beside the safetensors file, and of files that are ``unused``, comes the name alone, with an empty
    piece.
    """
    magic = file.read(2)

    def entries() -> Iterator[tuple[str, IO[bytes]]]:
        file.seek(0)
        return _zip(file) if magic == b"PK" else _tar(file, magic == b"\x1f\x8b", max_bytes)

    try:
        chosen = _chosen([path for path, _ in entries()])
        for path, opened in entries():
            if path not in chosen:
                continue
            passed_over = unused(path)
            name = passed_over[1] if passed_over else path.rpartition("/")[2]
            yield name, b""
            if passed_over or name in PICKLES:
                continue
            while piece := opened.read(_BLOCK):
                yield name, piece
    except _UNREADABLE as error:
        raise _refuse(f"it cannot be read as a tar, tar.gz or zip ({type(error).__name__})") from error
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise
        raise _refuse("it names places that it does not have; it is damaged, or cut off") from error


def _chosen(paths: list[str]) -> set[str]:
    """Of the ``paths`` of known files, those of the adapter: of each name the one nearest to the top.

    A trainer keeps ``checkpoint-500/adapter_config.json`` below the finished adapter. Raises AdapterRejected
    (``archive_invalid``) where two of a name are equally near, or the config and the weights that are nearest
    lie in different folders, and (``layout_foreign``) where the only
    weights are another trainer's.
    """
    chosen: dict[str, str] = {}
    beside = [path for path in paths if path.rpartition("/")[2] in CHAT_FILES]
    others = {path for path in paths if trainer_of(path.rpartition("/")[2]) is not None}
    passed_over = {path: found[0] for path in paths if (found := unused(path)) is not None}
    paths = [path for path in paths if path not in beside and path not in others | passed_over.keys()]
    for path in sorted(paths, key=lambda path: path.count("/")):
        name = path.rpartition("/")[2]
        if name in chosen and chosen[name].count("/") == path.count("/"):
            raise _refuse(f"it holds {name} twice")
        chosen.setdefault(name, path)
    folders = {chosen[name].rpartition("/")[0] for name in (CONFIG_FILE, WEIGHTS_FILE) if name in chosen}
    if len(folders) > 1:
        raise _refuse("the config and the weights nearest to its top lie in different folders")
    pickles = sorted(chosen.keys() & set(PICKLES))
    if pickles and WEIGHTS_FILE not in chosen:
        what = f"The archive holds {pickles[0]}, a pickle."
        raise fault("weights_not_safetensors", what, param=pickles[0])
    if WEIGHTS_FILE not in chosen:
        refuse_foreign(path.rpartition("/")[2] for path in others)
    # A tokenizer is the adapter's where it lies beside its config; elsewhere it may be anybody's.
    home = chosen.get(CONFIG_FILE, "").rpartition("/")[0]
    own = {path for path in beside if path.rpartition("/")[0] == home}
    return set(chosen.values()) | own | {path for path, folder in passed_over.items() if folder == home}


def _without_name(folder: Path) -> IO[bytes]:
    with disk_errors("keeping an archive"):
        return TemporaryFile(dir=folder)


def _next(entries: Iterator[tuple[str, bytes]]) -> tuple[str, bytes] | None:
    with disk_errors("reading an archive"):
        return next(entries, None)


def _write(file: IO[bytes], chunk: bytes) -> None:
    with disk_errors("keeping an archive"):
        file.write(chunk)


def _refuse(what: str) -> AdapterRejected:
    return fault("archive_invalid", f"The archive: {what}.", param="archive")


def _is_wanted(path: str, count: int) -> bool:
    """Whether the entry is a known file, at the top or in a folder; refuses paths to one that lead out."""
    if count > MAX_ENTRIES:
        raise _refuse(f"it has more than {MAX_ENTRIES} entries")
    name = _SEPARATORS.split(path)[-1]  # of whatever system
    if not (name in _KNOWN or trainer_of(name) is not None or unused(path) is not None):
        return False
    if path.startswith("/") or "\\" in path or "\0" in path or ".." in path.split("/") or path[1:2] == ":":
        raise _refuse(f"{show(path)} leads out of it")
    return True


def _tar(file: IO[bytes], compressed: bool, max_bytes: int) -> Iterator[tuple[str, IO[bytes]]]:
    source: Any = _Bounded(gzip.GzipFile(fileobj=file) if compressed else file, max_bytes)
    with tarfile.open(fileobj=source, mode="r:") as archive:
        for count, member in enumerate(archive, 1):
            wanted = _is_wanted(member.name, count)
            if member.size < 0:
                raise _refuse(f"{show(member.name)} claims {show(member.size)} bytes")
            if member.isdir():
                continue
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
                if not wanted or unused(member.name):
                    continue  # a log folder's `latest`, say
                raise _refuse(f"{show(member.name)} is a link, a device or another special file")
            opened = archive.extractfile(member) if wanted else None
            if opened is not None:
                yield member.name, opened
    while source.read(_BLOCK):  # a tar ends before its gzip, whose end has the sum of it all
        pass


class _Bounded:
    """A file of which at most ``max_bytes`` are read or passed over, and little in one piece."""

    def __init__(self, file: Any, max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self.tell = file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= max(MAX_LISTING, _BLOCK):
            raise _refuse(f"one of its headers claims {show(size)} bytes")
        self._check(self.tell() + size - max(MAX_LISTING, _BLOCK))
        data: bytes = self._file.read(size)
        return data

    def seek(self, offset: int) -> int:
        self._check(offset)
        return int(self._file.seek(offset))

    def _check(self, offset: int) -> None:
        if offset > self._max_bytes:
            raise UploadTooLarge(
                f"The archive holds more than {self._max_bytes} bytes. Leave out what is not the adapter's,"
                " or ask the operator to raise LORAPLEX_MAX_UPLOAD_BYTES."
            )


def _zip(file: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    _check_listing(file)
    with zipfile.ZipFile(file) as archive:
        for count, info in enumerate(archive.infolist(), 1):
            path = info.orig_filename.replace("\\", "/")  # as Windows PowerShell's Compress-Archive has them
            wanted = _is_wanted(path, count)
            kind = info.external_attr >> 28  # of the mode that Unix keeps there
            if wanted and kind not in (0, 4, 8) and not unused(path):
                raise _refuse(f"{show(path)} is a link, a device or another special file")
            if wanted and not path.endswith("/"):
                with archive.open(info) as opened:
                    yield path, opened


def _check_listing(file: IO[bytes]) -> None:
    """zipfile reads the whole list of entries into memory, whatever its size."""
    size = file.seek(0, 2)
    file.seek(max(0, size - (1 << 16) - 42))
    tail = file.read()
    at = tail.rfind(_END_OF_ZIP)
    if at < 0 or len(tail) < at + 22:
        raise _refuse("it is a zip without an end")
    entries, listing = struct.unpack("<HI", tail[at + 10 : at + 16])
    if tail[max(0, at - 20) : at].startswith(_END_OF_ZIP64):
        raise _refuse(
            "it is a Zip64, as for more than 65,535 files or 4 GiB; pack it as a plain zip, or as a tar"
        )
    if entries > MAX_ENTRIES or listing > MAX_ZIP_LISTING:
        raise _refuse(
            f"it is a zip of more than {MAX_ENTRIES} entries or {MAX_ZIP_LISTING} bytes of their names"
        )
    file.seek(0)

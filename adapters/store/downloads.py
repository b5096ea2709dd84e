"""A version's files as a tar: what was stored, in the order of their names."""

from __future__ import annotations

import asyncio
import json
import tarfile
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from adapters.errors import StorageFailed
from adapters.model import PROBES_FILE

_PIECE = 1 << 20


class Download:
    """The files of a version in ``folder``, opened at once: what is deleted meanwhile still comes whole.

    ``golden`` becomes its ``probes.json``. Raises StorageFailed where the files are not there.
    ``size_bytes`` is that of the tar. Iterate it once, or ``close`` it.
    """

    def __init__(self, folder: Path, golden: Mapping[str, Any] | None) -> None:
        self._files: list[tuple[tarfile.TarInfo, IO[bytes]]] = []
        self._stack = ExitStack()
        try:
            for path in sorted(folder.iterdir()):
                if path.is_file():
                    self._add(path.name, self._stack.enter_context(path.open("rb")), path.stat().st_size)
        except OSError as exc:
            self.close()
            raise StorageFailed("The files of this version cannot be read here.") from exc
        if golden is not None:
            probes = json.dumps(golden, indent=1).encode()
            self._add(PROBES_FILE, BytesIO(probes), len(probes))
        whole = sum(tarfile.BLOCKSIZE + _padded(info.size) for info, _ in self._files)
        self.size_bytes = whole + 2 * tarfile.BLOCKSIZE

    def _add(self, name: str, file: IO[bytes], size: int) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o644
        self._files.append((info, file))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            for info, file in self._files:
                yield info.tobuf(tarfile.USTAR_FORMAT)
                left = info.size
                while left and (piece := await asyncio.to_thread(file.read, min(left, _PIECE))):
                    left -= len(piece)
                    yield piece
                if left:
                    raise StorageFailed("A file of this version is shorter than it was.")
                yield bytes(_padded(info.size) - info.size)
            yield bytes(2 * tarfile.BLOCKSIZE)
        finally:
            self.close()

    def close(self) -> None:
        """Closes the files; may be repeated."""
        self._stack.close()


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

"""What names a blob: the SHA-256 over the lines ``name size sha256`` of its files, by name."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from adapters.tasks import run_in_thread

logger = logging.getLogger(__name__)

_BLOCK = 1 << 20


def digest_from(files: Mapping[str, tuple[int, str]]) -> str:
    """The digest of an adapter; ``files`` maps a name to its size in bytes and its SHA-256 in hex."""
    lines = "".join(f"{name} {size} {sha256}\n" for name, (size, sha256) in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def digest_of(folder: Path) -> str | None:
    """The digest of the files in ``folder`` as they are now; None where they cannot be read."""
    files = {}
    try:
        for path in folder.iterdir():
            with _open(path) as file:
                files[path.name] = (path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as exc:
        logger.warning("blob %s cannot be read: %s", folder.name, exc)
        return None
    return digest_from(files)


def _open(path: Path) -> BufferedReader:
    """OSError for what is no file: to open a pipe would wait for its other end."""
    if not path.is_file():
        raise OSError(errno.EINVAL, "not an ordinary file", str(path))
    return path.open("rb")


async def digest_slowly(folder: Path, rate: float) -> str | None:
    """As ``digest_of``, at most ``rate`` bytes a second, and in a thread for each piece."""
    files = {}
    try:
        for path in await run_in_thread(lambda: list(folder.iterdir())):
            found, size = hashlib.sha256(), 0
            while step := await run_in_thread(_hash_block, path, size, found):
                size += step
                await asyncio.sleep(step / rate)
            files[path.name] = (size, found.hexdigest())
    except OSError:
        return None
    return digest_from(files)


def _hash_block(path: Path, at: int, found: Any) -> int:
    with _open(path) as file:
        file.seek(at)
        block = file.read(_BLOCK)
    found.update(block)
    return len(block)

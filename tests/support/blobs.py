"""Uploads into a blob store of tests, ways to damage what lies there, and what must always hold of it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from adapters.store.blobs import BlobStore

CONFIG = b'{"r": 8}'
WEIGHTS = bytes(range(256)) * 10_000  # 2.4 MiB: three writes
MAX_BYTES = len(CONFIG) + len(WEIGHTS)


@pytest.fixture
async def store(tmp_path: Path) -> BlobStore:
    store = BlobStore(tmp_path / "data", max_bytes=MAX_BYTES)
    await store.open()
    return store


def digest_of(config: bytes = CONFIG, weights: bytes = WEIGHTS) -> str:
    lines = "".join(
        f"{name} {len(data)} {hashlib.sha256(data).hexdigest()}\n"
        for name, data in ((CONFIG_FILE, config), (WEIGHTS_FILE, weights))
    )
    return hashlib.sha256(lines.encode()).hexdigest()


async def upload(store: BlobStore, config: bytes = CONFIG, weights: bytes = WEIGHTS) -> Path:
    async with store.receive() as incoming:
        await incoming.write(CONFIG_FILE, config)
        for at in range(0, len(weights), 300_000):
            await incoming.write(WEIGHTS_FILE, weights[at : at + 300_000])
        await incoming.finish()
        return await incoming.commit()


def quarantined(store: BlobStore) -> list[str]:
    return os.listdir(store.quarantine)


def committed(store: BlobStore) -> list[str]:
    return os.listdir(store.blobs)


def open_files(store: BlobStore) -> list[str]:
    """Descriptors of this process that lead into the store."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        if target.startswith(str(store.root)):
            found.append(target)
    return found


def assert_whole(path: Path, config: bytes = CONFIG, weights: bytes = WEIGHTS) -> None:
    assert sorted(os.listdir(path)) == [CONFIG_FILE, WEIGHTS_FILE]
    assert (path / CONFIG_FILE).read_bytes() == config
    assert (path / WEIGHTS_FILE).read_bytes() == weights


def assert_consistent(store: BlobStore) -> None:
    """Nothing in quarantine, nothing open; what is committed is whole."""
    assert quarantined(store) == []
    assert open_files(store) == []
    for name in committed(store):
        assert name == digest_of()
        assert_whole(store.blobs / name)


def flip(path: Path) -> None:
    file = path / WEIGHTS_FILE
    file.chmod(0o644)
    with file.open("r+b") as opened:
        opened.seek(1000)
        opened.write(b"\xff\xfe\xfd")

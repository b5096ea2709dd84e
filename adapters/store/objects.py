"""Blobs in an object store that the processes of a fleet share: S3, Google's, Azure's, or a folder.

    <url>/installation.json        {"id"}: the installation that the store belongs to
    <url>/blobs/<digest>/<file>    as in a data folder; the config comes last, so that with it a blob is whole

The names of objects follow from their contents, so two processes that put the same blob put the same bytes,
and nothing is ever changed. What an upload that broke off left behind goes by its age, as in a data folder.

Addresses and keys are those that the vendors' own programs read from the environment (``AWS_ACCESS_KEY_ID``,
``AWS_ENDPOINT_URL``, ``GOOGLE_APPLICATION_CREDENTIALS`` …), or come from where the machine runs.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, from_url
from obstore.store import ObjectStore as Bucket

from adapters.awake import AwakeTimeout
from adapters.errors import BlobMissing, StoreUnavailable
from adapters.files import sync_path, write_all
from adapters.model import CONFIG_FILE
from adapters.tasks import run_in_thread

logger = logging.getLogger(__name__)

SCHEMES = ("file", "s3", "gs", "az")
OWNER_FILE, CLOCK_FILE = "installation.json", "clock"
_BLOBS = "blobs"
_PIECE = 8 << 20
# Seconds: for a connection, for the next piece, and for a small call as a whole.
_CONNECT, _READ, _CALL = 5.0, 20.0, 15.0
_CHECK = 2.0
_RETRIES, _RETRY_FOR = 2, timedelta(seconds=10)


class WrongStore(ValueError):
    """The object store belongs to another installation, or cannot be used at all."""


def check_url(url: str) -> None:
    """Raises ValueError, with what is missing, for a URL that no store can be made of."""
    parts = urlsplit(url)
    named = parts.netloc or (parts.scheme == "file" and parts.path.strip("/"))
    if parts.scheme not in SCHEMES or not named:
        raise ValueError(
            f"{url!r} must name a bucket or a folder, as s3://bucket/prefix, gs://bucket or file:///folder"
        )


class ObjectStore:
    """The blobs under ``url``. Every call raises StoreUnavailable where the store does not answer."""

    def __init__(self, url: str) -> None:
        check_url(url)
        self.url = url
        self.claimed = False
        self._folder = Path(unquote(urlsplit(url).path)) if url.startswith("file:") else None
        self._bucket = _open(url, self._folder)

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"

    async def claim(self, installation: str) -> None:
        """Makes the store that of ``installation``, an id, if it is nobody's yet; WrongStore if it is
        another's.
        """
        with _errors("reading whose the object store is"):
            content = json.dumps({"id": installation}).encode()
            try:
                async with AwakeTimeout(_CALL):
                    await obstore.put_async(self._bucket, OWNER_FILE, content, mode="create")
                await self._sync(OWNER_FILE)
                self.claimed = True
                return
            except FileNotFoundError as error:
                raise WrongStore(f"the object store {self.url} has no such bucket; make it first") from error
            except AlreadyExistsError:
                found = await self.owner()
        if found != installation:
            raise WrongStore(
                f"the object store {self.url} belongs to another installation, {found}; this one is"
                f" {installation}. Nothing was touched. Set LORAPLEX_BLOBS_URL to another prefix, or"
                f" LORAPLEX_DATABASE_URL to the database that belongs to it."
            )
        self.claimed = True

    async def adopt(self, installation: str) -> None:
        """Makes the store that of ``installation``, whoever's it was."""
        with _errors("taking over the object store"):
            async with AwakeTimeout(_CALL):
                await obstore.put_async(self._bucket, OWNER_FILE, json.dumps({"id": installation}).encode())
            await self._sync(OWNER_FILE)
        self.claimed = True

    async def owner(self) -> str | None:
        """The id of the installation that the store belongs to; None where it is nobody's."""
        with _errors("reading whose the object store is"):
            try:
                async with AwakeTimeout(_CALL):
                    answer = await obstore.get_async(self._bucket, OWNER_FILE)
                    return str(json.loads(bytes(await answer.bytes_async()))["id"])
            except FileNotFoundError:  # which the library raises for an object that is not there
                return None
            except (ValueError, KeyError, TypeError) as error:
                raise WrongStore(f"{self.url}/{OWNER_FILE} is damaged ({error})") from error

    async def check(self) -> None:
        """Whether the store answers, and soon: whoever asks wants to know it now."""
        with _errors("asking the object store"):
            async with AwakeTimeout(_CHECK):
                await self.owner()

    async def put(self, digest: str, folder: Path) -> None:
        """Copies the files in ``folder``; when it returns, every process of the fleet can read them."""
        with _errors(f"storing {digest}"):
            for path in await run_in_thread(_config_last, folder):
                name = f"{_BLOBS}/{digest}/{path.name}"
                await obstore.put_async(self._bucket, name, path)
                await self._sync(name)

    async def get(self, digest: str, folder: Path) -> None:
        """Copies the blob's files into ``folder``, which is there and empty; whoever asks checks the digest.

        Raises BlobMissing where the store has no whole blob of this name, and OSError where ``folder`` cannot
        be written.
        """
        with _errors(f"fetching {digest}"):
            names = [name async for name, _ in self._listed(f"{_BLOBS}/{digest}/")]
            files = {name.rsplit("/", 1)[-1]: name for name in names}
            if CONFIG_FILE not in files:
                raise BlobMissing(f"The object store has no files of {digest}.")
            for file, name in files.items():
                await self._download(name, folder / file)

    async def remove(self, digest: str) -> None:
        """Removes the blob's files, if they are there, the config first."""
        with _errors(f"removing {digest}"):
            names = [name async for name, _ in self._listed(f"{_BLOBS}/{digest}/")]
            for name in sorted(names, key=lambda name: not name.endswith(CONFIG_FILE)):
                with suppress(FileNotFoundError):
                    async with AwakeTimeout(_CALL):
                        await obstore.delete_async(self._bucket, name)
            if self._folder is not None:
                await run_in_thread(_remove_empty, self._folder / _BLOBS / digest)

    async def now(self) -> float:
        """Seconds since 1970 by the store's clock, of which the times of its objects are."""
        with _errors("asking the object store for the time"):
            async with AwakeTimeout(_CALL):
                await obstore.put_async(self._bucket, CLOCK_FILE, b"")
                written = await obstore.head_async(self._bucket, CLOCK_FILE)
            return float(written["last_modified"].timestamp())

    async def ages(self) -> dict[str, float]:
        """Every blob, whole or not -> seconds since anything of it was last written."""
        now = await self.now()
        found: dict[str, float] = {}
        with _errors("listing the object store"):
            async for name, written in self._listed(f"{_BLOBS}/"):
                parts = name.split("/")
                if len(parts) == 3:
                    found[parts[1]] = min(found.get(parts[1], float("inf")), now - written)
        return found

    async def sweep(
        self, linked: Collection[str], older_than: float, is_digest: Callable[[str], bool]
    ) -> list[str]:
        """Removes blobs that are not ``linked`` and older than so many seconds; returns their names.

        None where the store has not been found to be this installation's.
        """
        removed: list[str] = []
        if not self.claimed:
            return removed
        for digest, age in sorted((await self.ages()).items()):
            if is_digest(digest) and digest not in linked and age >= older_than:
                await self.remove(digest)
                removed.append(digest)
        return removed

    async def _listed(self, prefix: str) -> AsyncIterator[tuple[str, float]]:
        """Names under ``prefix``, and when each was written (seconds since 1970)."""
        stream = obstore.list(self._bucket, prefix=prefix).__aiter__()
        while True:
            try:
                async with AwakeTimeout(_CALL):
                    page = await anext(stream)
            except StopAsyncIteration:
                return
            for entry in page:
                yield entry["path"], entry["last_modified"].timestamp()

    async def _download(self, name: str, path: Path) -> None:
        try:
            async with AwakeTimeout(_CALL):
                answer = await obstore.get_async(self._bucket, name)
        except FileNotFoundError as error:
            raise BlobMissing(f"The object store has lost {name}.") from error
        async with _writing(path) as descriptor:
            pieces = answer.stream(min_chunk_size=_PIECE).__aiter__()
            while True:
                try:
                    async with AwakeTimeout(_READ * 2):
                        piece = await anext(pieces)
                except StopAsyncIteration:
                    return
                await run_in_thread(write_all, descriptor, piece)

    async def _sync(self, name: str) -> None:
        """A folder promises no more than its disk: what is acknowledged is flushed."""
        if self._folder is not None:
            await run_in_thread(_sync_with_parents, self._folder / name, self._folder)


@asynccontextmanager
async def _writing(path: Path) -> AsyncIterator[int]:
    """A new file, read-only and on disk at the end of the block."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = await run_in_thread(os.open, path, flags, 0o444)
    try:
        yield descriptor
        await run_in_thread(os.fsync, descriptor)
    finally:
        os.close(descriptor)


def _config_last(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda path: (path.name == CONFIG_FILE, path.name))


def _open(url: str, folder: Path | None) -> Bucket:
    """Raises WrongStore where the environment lacks what the store needs."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            return LocalStore(prefix=folder)
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
        plain = {"allow_http": True} if endpoint.startswith("http://") else {}
        return from_url(  # type: ignore[call-overload, no-any-return]
            url,
            client_options={
                "connect_timeout": timedelta(seconds=_CONNECT),
                "read_timeout": timedelta(seconds=_READ),
                "timeout": timedelta(hours=1),
                **plain,
            },
            retry_config={"max_retries": _RETRIES, "retry_timeout": _RETRY_FOR},
        )
    except (BaseError, OSError) as error:
        raise WrongStore(f"the object store {url} cannot be used: {error}") from error


def _sync_with_parents(path: Path, root: Path) -> None:
    sync_path(path)
    for parent in path.parents:
        sync_path(parent)
        if parent == root:
            return


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        logger.debug("%s stays", folder, exc_info=True)


@contextmanager
def _errors(doing: str) -> Iterator[None]:
    """What the library raises, and a timeout, as StoreUnavailable; the reason goes to the log."""
    try:
        yield
    except (BaseError, TimeoutError, FileNotFoundError) as error:
        reason = str(error).split("\n", 1)[0][:300] or type(error).__name__
        logger.warning("the object store failed while %s: %s", doing, reason)
        raise StoreUnavailable(
            "The store of adapters does not answer now, and nothing was changed; try again in a moment."
        ) from error

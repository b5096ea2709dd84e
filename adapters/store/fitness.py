"""What the engine of now may be given: files that are whole, and that it serves as PEFT would.

A version was inspected when it was uploaded, by the engine of then. Since, the engine may adapt fewer
modules, take smaller ranks, compute in another type or run another base model, and a disk may have changed a
byte. No version is read into memory before both have been looked at since the start: its bytes against its
digest, its config and header against the engine.

    <root>/fits/<mark>.json    {digest: null, or [code, reason]}: verdicts on files for one engine

A verdict follows from the digest and the engine, so it is kept over restarts, and 10,000 versions are known
at once. The file is a cache: without it the verdicts are found again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from adapters.errors import AdapterDamaged, AdapterRejected, AdapterUnfit
from adapters.model import BaseModel, Version
from adapters.store.blobs import BlobStore
from adapters.store.digests import digest_of
from adapters.tasks import run_in_thread

logger = logging.getLogger(__name__)

FOLDER = "fits"
# Verdicts for an engine that has not run for so long are removed, in seconds.
KEEP_S = 30 * 86_400.0
# Files found damaged are read again for a request at most so often, in seconds.
LOOK_AGAIN_S = 10.0
# The one type adapters are served in that ends before others do.
_NARROW = "float16"


@dataclass(frozen=True, slots=True)
class Serving:
    """What a verdict depends on: the base as the engine adapts it, its type, and this program's rules.

    ``same`` are fingerprints of other base models that the operator calls the same one.
    """

    base: BaseModel
    dtype: str
    program: str
    same: tuple[str, ...] = ()

    @property
    def mark(self) -> str:
        """64 hex digits; another engine has another."""
        base = self.base
        layers = {**base.modules, **base.vocabulary}
        modules = {name: [shape.in_features, shape.out_features] for name, shape in layers.items()}
        fused = {name: list(parts) for name, parts in base.fused.items()}
        facts = [modules, fused, base.max_lora_rank, base.fingerprint, base.pooling, self.dtype, self.program]
        if base.head is not None:
            facts.append(asdict(base.head))
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def other_base(self, version: Version) -> AdapterUnfit | None:
        """Why not, where ``version`` was tried on another base model than this one."""
        here = self.base.fingerprint
        if version.base is None or here is None or version.base in (here, *self.same):
            return None
        return AdapterUnfit(
            f"Version {version.number} of `{version.adapter}` was uploaded for another base model: its"
            f" fingerprint was {version.base[:12]}…, and that of {self.base.name} is {here[:12]}…. Upload it"
            " again if it was trained on the model that is served here."
        )


Verdict = tuple[str, str] | None


class Fitness:
    """Knows it of every file that was looked at since the start. ``open`` once the engine runs.

    Before ``open`` nothing is refused, and nothing is ready.
    """

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._serving: Serving | None = None
        self._verdicts: dict[str, Verdict] = {}
        self._sound: dict[str, _Marks] = {}
        self._damaged: dict[str, tuple[float, _Marks]] = {}
        self._unsaved = False
        self._met_other_base = False
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def __repr__(self) -> str:
        return f"Fitness(verdicts={len(self._verdicts)}, unfit={len(self.unfit)}, damaged={self.damaged})"

    async def open(self, serving: Serving) -> None:
        """From now on versions are held against ``serving``."""
        self._verdicts = await run_in_thread(self._read, serving.mark)
        self._serving = serving

    async def save(self) -> None:
        """Keeps the verdicts for the next start, if there are new ones."""
        if self._serving is not None and self._unsaved:
            self._unsaved = False
            await run_in_thread(self._write, self._serving.mark, dict(self._verdicts))

    @property
    def unfit(self) -> list[str]:
        """Digests of files that the engine does not serve."""
        return [digest for digest, verdict in self._verdicts.items() if verdict is not None]

    @property
    def bases(self) -> tuple[str, ...]:
        """Fingerprints of the base models whose adapters are served, if versions for others were met."""
        serving = self._serving
        if serving is None or serving.base.fingerprint is None or not self._met_other_base:
            return ()
        return serving.base.fingerprint, *serving.same

    @property
    def damaged(self) -> list[str]:
        """Digests whose bytes were other ones, or not there, when they were last read."""
        return sorted(self._damaged)

    def knows(self, digest: str) -> bool:
        """Whether these files have been held against the engine."""
        return digest in self._verdicts

    def problem(self, version: Version) -> AdapterUnfit | None:
        """Why the engine does not serve ``version``; None where it does, or where that is not known yet."""
        if self._serving is None:
            return None
        verdict = self._verdicts.get(version.digest)
        if verdict is not None:
            code, reason = verdict
            return AdapterUnfit(
                f"Version {version.number} of `{version.adapter}` cannot be served faithfully by the engine"
                f" as it is set up now ({code}): {reason} It could be when it was uploaded, so the engine was"
                " started otherwise since: ask the operator to start it as it was, or upload a version for"
                " the engine of now."
            )
        other = self._serving.other_base(version)
        self._met_other_base |= other is not None
        return other

    def damage(self, version: Version) -> AdapterDamaged | None:
        """What whoever needs ``version`` read is told; None where its files were whole at the last look.

        One that is in memory was whole when it was read, and goes on answering.
        """
        return _damaged(version) if version.digest in self._damaged else None

    def is_ready(self, version: Version) -> bool:
        """Whether the files may be read into memory without being looked at again."""
        known = self._sound.get(version.digest)
        return (
            known is not None
            and self._verdicts.get(version.digest, ("", "")) is None
            and self.problem(version) is None
            and known == _marks(version.path)
        )

    async def prepare(self, version: Version) -> None:
        """Looks at what has not been looked at. Raises AdapterDamaged or AdapterUnfit."""
        async with self._lock(version.digest):
            seen = await run_in_thread(_marks, version.path)
            if self._sound.get(version.digest) != seen and (
                self._was_just_damaged(version, seen) or not await self._is_whole(version.digest)
            ):
                raise _damaged(version)
            await self._judge(version.digest)
        if (problem := self.problem(version)) is not None:
            raise problem

    async def judge(self, digest: str) -> None:
        """Holds the files against the engine, if that has not been done. Damaged ones get no verdict."""
        async with self._lock(digest):
            await self._judge(digest)

    async def is_whole(self, digest: str) -> bool:
        """Reads the bytes, and remembers what it found."""
        async with self._lock(digest):
            return await self._is_whole(digest)

    def known(self) -> set[str]:
        """Digests of the files that there is a verdict on."""
        return set(self._verdicts)

    def admitted(self, digest: str) -> None:
        """An upload was inspected, for this engine, and committed: both looks have been taken."""
        self._sound[digest] = _marks(self._blobs.path(digest))
        self._damaged.pop(digest, None)
        if self._serving is not None:
            self._keep(digest, None)

    def fetched(self, digest: str) -> None:
        """The files have come from the object store, and are those of ``digest``."""
        self._sound[digest] = _marks(self._blobs.path(digest))
        self._damaged.pop(digest, None)

    def forget(self, digest: str) -> None:
        """The files are gone, as nobody links them any more."""
        self._sound.pop(digest, None)
        self._damaged.pop(digest, None)
        if digest in self._verdicts:
            del self._verdicts[digest]
            self._unsaved = True

    def _lock(self, digest: str) -> asyncio.Lock:
        return self._locks.setdefault(digest, asyncio.Lock())

    def _keep(self, digest: str, verdict: Verdict) -> None:
        self._verdicts[digest] = verdict
        self._unsaved = True

    def _is_elsewhere(self, digest: str) -> bool:
        """Whether the files are to be fetched first: they are looked at when they are here."""
        return self._blobs.objects is not None and not self._blobs.path(digest).exists()

    async def _is_whole(self, digest: str) -> bool:
        path = self._blobs.path(digest)
        if self._is_elsewhere(digest):
            self._sound.pop(digest, None)
            self._damaged.pop(digest, None)
            return False
        before = await run_in_thread(_marks, path)
        if await run_in_thread(digest_of, path) == digest:
            self._sound[digest] = before
            if self._damaged.pop(digest, None) is not None:
                logger.warning("the files of %s are whole again", digest)
            return True
        self._sound.pop(digest, None)
        if digest not in self._damaged:
            logger.error("the files of %s are damaged or gone: no version of them is loaded", digest)
        self._damaged[digest] = time.monotonic(), before
        return False

    def _was_just_damaged(self, version: Version, seen: _Marks) -> bool:
        """Whether the same files were damaged a moment ago: they may be large, and asked for often."""
        looked, found = self._damaged.get(version.digest, (-LOOK_AGAIN_S, frozenset()))
        return time.monotonic() - looked < LOOK_AGAIN_S and found == seen

    async def _judge(self, digest: str) -> None:
        serving = self._serving
        if digest in self._verdicts or serving is None or self._is_elsewhere(digest):
            return
        try:
            verdict = await run_in_thread(_verdict, self._blobs.path(digest), serving)
        except OSError:
            await self._is_whole(digest)
            return
        # Nothing is said of an adapter because of what a disk made of it.
        if verdict is None or digest in self._sound or await self._is_whole(digest):
            self._keep(digest, verdict)

    def _read(self, mark: str) -> dict[str, Verdict]:
        folder = self._blobs.root / FOLDER
        path = folder / f"{mark}.json"
        try:
            for old in folder.glob("*.json"):
                if old != path and old.stat().st_mtime < time.time() - KEEP_S:
                    old.unlink(missing_ok=True)
            found: dict[str, Any] = json.loads(path.read_bytes())
            return {d: None if v is None else (str(v[0]), str(v[1])) for d, v in found.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError, IndexError) as error:
            logger.warning("%s is not usable (%s): every version is looked at again", path, error)
            return {}

    def _write(self, mark: str, verdicts: dict[str, Verdict]) -> None:
        path = self._blobs.root / FOLDER / f"{mark}.json"
        partial = path.with_suffix(".part")
        try:
            path.parent.mkdir(exist_ok=True)
            partial.write_text(json.dumps(verdicts))
            os.replace(partial, path)
        except OSError as error:
            logger.warning("verdicts on adapters are not kept for the next start: %s", error)


_Marks = frozenset[tuple[str, int, int, int]]


def _marks(folder: Path) -> _Marks:
    """Tells files from others written later under the same names; empty where they cannot be seen."""
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.stat()) for entry in entries]
    except OSError:
        return frozenset()
    return frozenset((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found)


def _verdict(folder: Path, serving: Serving) -> Verdict:
    from adapters.inspection.inspect import check_fit

    try:
        check_fit(folder, serving.base, serving_dtype=_NARROW if serving.dtype == _NARROW else None)
    except AdapterRejected as error:
        # Its cure is for whoever uploads: these files were accepted once, and are not what has changed.
        return error.code, error.reason
    return None


def _damaged(version: Version) -> AdapterDamaged:
    return AdapterDamaged(
        f"The files of version {version.number} of `{version.adapter}` are gone, or not those that were"
        " uploaded, so it is not loaded. Upload them again, or ask the operator to restore them."
    )

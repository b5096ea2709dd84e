"""The use case: an upload, top to bottom.

Bytes are committed under their digest before a row names them, so a failure at any step leaves nothing that
a request could reach, and little to roll back: what is not linked in the end is removed, after a crash by the
sweep at start-up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from adapters.errors import AdapterError, AdapterNotFound, DatabaseUnavailable, fault
from adapters.inspection.chat_files import read_chat_files, take_chat_files
from adapters.inspection.golden import Golden, take
from adapters.inspection.pickles import PICKLES, ignored_pickles
from adapters.inspection.unused import ignored_unused, is_unused
from adapters.model import NOTHING_WAIVED, TEMPLATE_FILE, Adapter, Manifest, Quota, Version, Waivers
from adapters.store.blobs import BlobStore, Incoming
from adapters.store.catalog import Catalog
from adapters.store.fitness import Fitness
from adapters.store.idempotency import Receipts
from adapters.store.quarantine import Quarantine
from adapters.store.upload_jobs import State, UploadJobs
from adapters.tasks import uninterruptible
from server.engine.engine import Engine
from server.engine.templates import TemplateFailed, templates
from server.errors import ServerError, Unavailable
from server.metrics import Metrics
from server.publishing.probe import Prober, no_effect
from server.scheduling.dispatcher import Dispatcher
from server.telemetry.spans import Stages

logger = logging.getLogger(__name__)

# How often a deleted version's blob is looked at until its last request is done.
_RECLAIM_EVERY = 0.5
RETRY_S = 1.0  # between two tries while the database is away


class Elsewhere(Protocol):
    """Replicas, as a gateway has them publish; see ``publish``, ``verify`` and ``truth.unfit``."""

    async def publish(
        self,
        tenant: str,
        name: str,
        files: AsyncIterator[tuple[str, bytes]],
        *,
        waived: Waivers,
        key: str | None,
        quota: Quota | None,
        annotation: str | None,
        keep_reason: bool,
        make_live: bool,
    ) -> Published: ...

    async def verify(self, tenant: str, name: str, number: int | None) -> dict[str, Any]: ...

    async def unfit(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True, slots=True)
class Publishing:
    """What an upload needs; made once by ``create_app``."""

    engine: Engine
    dispatcher: Dispatcher
    blobs: BlobStore
    catalog: Catalog
    receipts: Receipts
    prober: Prober
    quarantine: Quarantine
    fitness: Fitness
    jobs: UploadJobs
    keep_versions: int = 0
    max_versions: int | None = None
    # In a fleet, where others publish too: bytes go by age alone, and who pins what is agreed.
    shared: bool = False
    # Who does it, where this process has no engine.
    elsewhere: Elsewhere | None = None
    # The digest of each upload from commit to link; nobody removes it.
    coming: list[str] = field(default_factory=list)
    # Held to add one, and while a blob is removed: nobody commits what is about to go.
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)


Progress = Callable[[State, int], Awaitable[None]]


async def _no_progress(state: State, received_bytes: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Upload:
    """What is uploaded, and how; see ``publish``."""

    tenant: str
    name: str
    waived: Waivers
    key: str | None
    quota: Quota | None
    annotation: str | None
    progress: Progress
    make_live: bool = True


@dataclass(frozen=True, slots=True)
class Published:
    """``answer`` is the body of the response (``Adapter.upload_as_json``); ``gone`` goes to ``unpublish``."""

    answer: Mapping[str, Any]
    gone: list[Version] = field(default_factory=list)


async def publish(
    service: Publishing,
    tenant: str,
    name: str,
    files: AsyncIterator[tuple[str, bytes]],
    *,
    waived: Waivers = NOTHING_WAIVED,
    key: str | None = None,
    quota: Quota | None = None,
    annotation: str | None = None,
    progress: Progress = _no_progress,
    keep_reason: bool = True,
    make_live: bool = True,
) -> Published:
    """Receives ``files`` as (file name, bytes) pieces and makes them the live version of ``name``.

    Without ``make_live`` the version before it stays live, if there is one.

    When it returns, the files and the row are on disk. Raises an AdapterError or ServerError, with nothing
    kept but, with ``keep_reason``, the reason, and logs one line that names the adapter. ``waived`` are
    checks that the upload does without, ``annotation`` is a note for people. ``progress`` is told each state
    after ``receiving``, with the bytes that came. An upload repeated with its ``key`` is answered as before.
    """
    if service.elsewhere is not None:
        sent = _told_at_the_end(files, progress)
        return await service.elsewhere.publish(
            tenant,
            name,
            sent,
            waived=waived,
            key=key,
            quota=quota,
            annotation=annotation,
            keep_reason=keep_reason,
            make_live=make_live,
        )
    stages = Stages(tenant, name)

    async def told(state: State, received: int) -> None:
        stages.next(state, received)
        await progress(state, received)

    upload = Upload(tenant, name, waived, key, quota, annotation, told, make_live)
    try:
        published = await _publish(service, upload, files)
        stages.end()
        return published
    except (AdapterError, ServerError) as exc:
        stages.end(exc.code)
        if keep_reason:
            await _keep_reason(service, upload, exc)
        about = {"tenant": tenant, "adapter": name[:128], "code": exc.code}
        whole = f"{tenant}/{name[:128]}"
        logger.warning("upload of %r refused, %s: %s", whole, exc.code, exc.message, extra=about)
        raise


async def _told_at_the_end(
    files: AsyncIterator[tuple[str, bytes]], progress: Progress
) -> AsyncIterator[tuple[str, bytes]]:
    """``files``, and then ``progress`` hears that they are here: what follows happens elsewhere."""
    received = 0
    async for name, piece in files:
        received += len(piece)
        yield name, piece
    await progress("inspecting", received)


async def _keep_reason(service: Publishing, upload: Upload, exc: AdapterError | ServerError) -> None:
    """For people who look for it later. What keeps it from being written must not hide it."""
    try:
        await service.jobs.refused(upload.tenant, upload.name, exc.code, exc.message)
    except Exception as error:
        logger.warning("the reason of a refused upload could not be kept: %s", error)


async def _publish(service: Publishing, upload: Upload, files: AsyncIterator[tuple[str, bytes]]) -> Published:
    tenant, name, waived, key = upload.tenant, upload.name, upload.waived, upload.key
    quota = replace(upload.quota or Quota(), versions=service.max_versions, keep=service.keep_versions)
    service.catalog.check_name(name)
    # With a key it may be a repeated one, which takes no more room.
    await service.catalog.check_quota(tenant, name, replace(quota, versions=None) if key else quota)
    async with service.blobs.receive() as incoming:
        pickles: set[str] = set()
        unused: set[str] = set()
        async for filename, chunk in files:
            if filename in PICKLES and not chunk:  # an archive says that it has one beside the weights
                pickles.add(filename)
            elif is_unused(filename) and not chunk:
                unused.add(filename)
            else:
                await incoming.write(filename, chunk)
        uploaded = await incoming.finish()
        await upload.progress("inspecting", incoming.size_bytes)
        asked = (name, uploaded, *_asked(waived))
        once = service.receipts.once(tenant, key, *asked, note=upload.annotation, make_live=upload.make_live)
        async with once as receipt:
            if receipt is not None and receipt.answer is not None:
                return Published(receipt.answer)
            # Brings torch along, which a gateway does without.
            from adapters.inspection.admit import admit

            golden = await incoming.examine(take)
            chat, doubts = await _chat_of(service, tenant, incoming)
            manifest = await incoming.examine(
                partial(
                    admit,
                    base=service.engine.base,
                    original_digest=uploaded,
                    serving_dtype=service.engine.lora_dtype,
                    waived=waived,
                )
            )
            manifest = replace(manifest, chat=chat, warnings=(*manifest.warnings, *doubts))
            if pickles:
                warning = ignored_pickles(sorted(pickles))
                manifest = replace(manifest, warnings=(*manifest.warnings, warning))
            if unused:
                manifest = replace(manifest, warnings=(*manifest.warnings, ignored_unused(unused)))
            async with _committed(service, incoming, tenant, name, manifest) as candidate:
                await upload.progress("probing", incoming.size_bytes)
                manifest = await _probed(service, candidate, manifest, golden, waived)
                await upload.progress("linking", incoming.size_bytes)
                link = service.catalog.link(
                    tenant,
                    name,
                    digest=candidate.digest,
                    manifest=manifest,
                    golden=golden,
                    receipt=receipt,
                    quota=quota,
                    annotation=upload.annotation,
                    make_live=upload.make_live or await _none_is_live(service, tenant, name),
                )
                adapter, version = await uninterruptible(link)
    service.dispatcher.numbered(version)
    if not service.shared:
        move_pin(service.dispatcher, adapter)
    answer = adapter.upload_as_json(version.number, manifest.as_json())
    return Published(answer, await _make_room(service, adapter))


async def _chat_of(
    service: Publishing, tenant: str, incoming: Incoming
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """What the upload says about chats, for its report, and warnings; kept where it is not the base's.

    AdapterRejected, also for a template that does not run (``chat_template_invalid``).
    """
    found = await incoming.examine(partial(read_chat_files, base=service.engine.base.chat))
    form = "string"
    if found is not None and found.template is not None:
        try:
            form = await templates().check(tenant, found.template)
        except TemplateFailed as exc:
            raise fault(
                "chat_template_invalid", f"The chat template does not run: {exc}.", param=TEMPLATE_FILE
            ) from exc
    await incoming.examine(partial(take_chat_files, found=found))
    if found is None:
        return None, ()
    kept = found.template is not None or bool(found.tokens or found.stop_token_ids)
    return found.as_json() | {"kept": kept, "content_format": form}, found.warnings


async def _none_is_live(service: Publishing, tenant: str, name: str) -> bool:
    try:
        return (await service.catalog.adapter(tenant, name)).live is None
    except AdapterNotFound:
        return True


def _asked(waived: Waivers) -> tuple[object, ...]:
    """What of ``waived`` tells two uploads with one idempotency key apart.

    The first alone where nothing else is waived: receipts that an earlier release kept stay valid.
    """
    more = (waived.implausible, waived.fields)
    return (waived.no_effect, *more) if any(more) else (waived.no_effect,)


async def _probed(
    service: Publishing, candidate: Version, manifest: Manifest, golden: Golden | None, waived: Waivers
) -> Manifest:
    """``manifest`` with what the engine showed; AdapterRejected if that is not what was trained."""
    await service.quarantine.check(candidate.tenant, candidate.digest)
    known = await service.catalog.probe_of(candidate.digest)
    probe = await service.prober.probe(candidate, known)
    if not (probe["effect"] or waived.no_effect):
        raise no_effect(manifest, probe)
    if (manifest.chat or {}).get("template"):
        await service.prober.chat(candidate)
    agreement = await service.prober.check(candidate, golden) if golden is not None else None
    if agreement is not None:
        agreement.agreed()
    return replace(
        manifest,
        probe=probe | {"no_effect_allowed": waived.no_effect},
        golden=service.prober.held(agreement) if agreement is not None else None,
    )


async def _make_room(service: Publishing, adapter: Adapter) -> list[Version]:
    """Removes the rows of versions that are too many."""
    keep = service.keep_versions if adapter.keep_versions is None else adapter.keep_versions
    if not 0 < keep < len(adapter.versions):
        return []
    return await service.catalog.keep_newest(adapter.tenant, adapter.name, keep)


@asynccontextmanager
async def _committed(
    service: Publishing, incoming: Incoming, tenant: str, name: str, manifest: Manifest
) -> AsyncIterator[Version]:
    """The files in their place, as a version without a number; if the block fails they go again."""
    digest = incoming.digest
    assert digest is not None, "finish comes first"
    path = service.blobs.path(digest)
    candidate = Version(
        tenant, name, 0, digest, path, manifest.rank, manifest.size_bytes, chat=manifest.chat or {}
    )
    async with service.changing:
        service.coming.append(digest)
    try:
        await incoming.commit()
        service.fitness.admitted(digest)
        yield candidate
    except BaseException:
        service.coming.remove(digest)
        await unpublish(service, [candidate])
        raise
    service.coming.remove(digest)


async def verify(service: Publishing, tenant: str, name: str, number: int | None) -> dict[str, Any]:
    """A version, the live one if None, against the golden probes it came with. AdapterNotFound."""
    if service.elsewhere is not None:
        return await service.elsewhere.verify(tenant, name, number)
    version = await service.catalog.version(tenant, name, number)
    return {"adapter": name, "version": version.number, **await _verified(service, version)}


async def verify_all(service: Publishing, metrics: Metrics, not_possible: set[Version] | None = None) -> None:
    """The same for every version that answers and was last held against another engine, dtype or base.

    One after the other, beside the customers' requests. What disagrees is logged and counted, and goes on
    answering: whether to roll back the engine or the adapter is the operator's to say. ``not_possible`` gets
    those that cannot be held against their probes. It breaks off, with a warning, where the server is
    stopping or without its engine or its database.
    """
    for version in await service.catalog.unverified(service.prober.golden_here):
        if version.quarantine is not None:
            continue
        what = f"{version.tenant}/{version.adapter}@{version.number}"
        try:
            report = await _verified(service, version)
        except (Unavailable, DatabaseUnavailable) as exc:
            logger.warning("verifying golden probes breaks off at %s: %s", what, exc)
            return
        except (AdapterError, ServerError) as exc:
            metrics.verified("not_possible")
            if not_possible is not None:
                not_possible.add(version)
            logger.warning("%s could not be verified: %s", what, exc)
            continue
        metrics.verified("matches" if report["matches"] else "differs")
        if not report["matches"]:
            if report.get("identical") is False:
                logger.error("%s does not answer with the bits of before", what)
                continue
            logger.error(
                "%s differs from its probes.json by %.3g, and %.3g is allowed: the engine, its dtype or the"
                " base model have changed since it was uploaded",
                *(what, report["largest_difference"], report["tolerance"]),
            )


async def _verified(service: Publishing, version: Version) -> dict[str, Any]:
    agreement = await service.prober.check(version, await service.catalog.golden(version))
    report = service.prober.held(agreement, await service.catalog.verified(version))
    await service.catalog.keep_verified(version, report)
    return report


def move_pin(dispatcher: Dispatcher, adapter: Adapter) -> None:
    """Pins and loads the versions of a pinned adapter that answer to its name, and lets go of all others."""
    shares = adapter.shares if adapter.pinned else ()
    answering = {version.key for version, _ in shares if version.quarantine is None}
    for key, version in {info.version.key: info.version for info in adapter.versions}.items():
        dispatcher.pin(version, key in answering)


async def unpublish(service: Publishing, versions: list[Version]) -> None:
    """Frees the memory and the bytes of versions without a row, once their last request is done."""
    gone = {version.key: version for version in versions}
    for tenant in {version.tenant for version in versions}:
        for named in await service.catalog.of_files(tenant, {version.digest for version in versions}):
            gone.pop(named.key, None)  # the same bytes under another number
    for version in gone.values():
        service.dispatcher.retire(version)
    if service.shared:
        return
    while service.dispatcher.in_use(gone.keys()):
        await asyncio.sleep(_RECLAIM_EVERY)
    try:
        await remove_unlinked(service, {version.digest for version in versions})
    except AdapterError as error:
        # Nobody waits for it any more, and what nobody links is removed at a start.
        logger.warning("files of a deleted version stay until the next start: %s", error)


async def unpublish_at_last(service: Publishing, versions: list[Version]) -> None:
    """As ``unpublish``, as often as it takes: the database may be away, and nobody waits for it."""
    while True:
        try:
            return await unpublish(service, versions)
        except AdapterError as error:
            logger.warning("deleted versions stay in memory until the database answers: %s", error)
            await asyncio.sleep(RETRY_S)


async def remove_unlinked(service: Publishing, digests: set[str]) -> None:
    async with service.changing:
        for digest in digests:
            if digest not in service.coming and not await service.catalog.is_linked(digest):
                await service.blobs.remove(digest)
                service.fitness.forget(digest)

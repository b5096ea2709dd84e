"""The use case: an upload that is answered as soon as its bytes are here, and goes on by itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any

from adapters.errors import AdapterError
from adapters.store.upload_jobs import INTERRUPTED, State, UploadJobs
from server.errors import ServerError
from server.publishing.publish import Published, Publishing, publish

logger = logging.getLogger(__name__)

BEAT_S = 15.0


async def publish_later(
    service: Publishing,
    tenant: str,
    name: str,
    files: AsyncIterator[tuple[str, bytes]],
    in_background: Callable[[Coroutine[Any, Any, None]], object],
    published: Callable[[Published], Awaitable[Mapping[str, Any]]],
    **options: Any,
) -> dict[str, Any]:
    """As ``publish``, but returns the job once all bytes are here.

    ``published`` is called at the end, and returns what the job is answered with.

    Raises what ``publish`` does where that happens before: the body is at fault, or a quota.
    """
    jobs = service.jobs
    id_ = await jobs.begin(tenant, name)
    received, failed = asyncio.Event(), asyncio.get_running_loop().create_future()
    failed.add_done_callback(lambda _: received.set())

    async def told(state: State, received_bytes: int) -> None:
        await jobs.keep_alive(id_, state=state, received_bytes=received_bytes)
        received.set()

    async def work() -> None:
        beating = asyncio.create_task(_beat(jobs, id_))
        try:
            with jobs.worked_on(id_):
                done = await publish(
                    service, tenant, name, files, progress=told, keep_reason=False, **options
                )
                await jobs.done(id_, dict(await published(done)))
        except (AdapterError, ServerError) as exc:
            with suppress(Exception):
                await jobs.refused(tenant, name, exc.code, exc.message, id_)
            failed.set_exception(exc)
        except asyncio.CancelledError:
            with suppress(Exception):
                await jobs.refused(tenant, name, INTERRUPTED, "The server stopped. Send it again.", id_)
            failed.cancel()
            raise
        except Exception as exc:
            if received.is_set():
                logger.exception("an upload failed")
            code, message = (
                ("internal_error", "The server failed on this upload.")
                if received.is_set()
                else ("upload_incomplete", "The upload broke off before its end; send it again.")
            )
            with suppress(Exception):
                await jobs.refused(tenant, name, code, message, id_)
            failed.set_exception(exc)
        finally:
            beating.cancel()

    in_background(work())
    await received.wait()
    if failed.done():
        return failed.result()  # type: ignore[no-any-return]  # which raises
    failed.add_done_callback(lambda future: future.cancelled() or future.exception())
    return await jobs.get(tenant, name, id_)


async def _beat(jobs: UploadJobs, id_: str) -> None:
    while True:
        await asyncio.sleep(BEAT_S)
        with suppress(Exception):  # the next one may be written
            await jobs.keep_alive(id_)

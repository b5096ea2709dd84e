"""The only place where parts are joined: ``create_app(settings)`` and its lifespan."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from adapters.database.database import Database
from adapters.store.blobs import BlobStore
from adapters.store.catalog import Catalog
from adapters.store.idempotency import Receipts
from server import __version__
from server.accounts.tenants import Tenants
from server.accounts.usage import Recorder, spent
from server.engine.engine import Engine, EngineDied
from server.http import admin, inference, reports, self_service
from server.http.middleware import RequestContext, in_background, install_error_handlers
from server.http.openapi import document
from server.inference.completion import Completions
from server.inference.fields import DEFAULT_MODEL
from server.limits.quotas import Quotas
from server.limits.redis import SharedLimits
from server.metrics import Gauges, Metrics
from server.publishing.probe import Prober
from server.publishing.publish import Publishing, verify_all
from server.scheduling.dispatcher import Dispatcher
from server.scheduling.plan import Limits
from server.settings import Settings

logger = logging.getLogger(__name__)

StartEngine = Callable[[Settings], Awaitable[Engine]]


def create_app(
    settings: Settings,
    *,
    start_engine: StartEngine = Engine.start,
    on_death: Callable[[EngineDied], None] = lambda _: None,
) -> FastAPI:
    """The whole service. ``on_death`` is called once if the engine process goes away."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            try:
                await _start(app, settings, start_engine, on_death, stack)
            except Exception as exc:
                expected = isinstance(exc, ValueError | OSError)
                logger.critical("cannot start: %s", exc, exc_info=None if expected else exc)
                raise
            yield
            await _finish_tasks(app)

    app = FastAPI(title="Loraplex", version=__version__, lifespan=lifespan)
    app.state.settings = settings
    app.state.draining = False
    app.state.tasks = set()
    app.add_middleware(RequestContext)
    install_error_handlers(app)
    app.include_router(inference.router)
    app.include_router(inference.tokens)
    app.include_router(admin.router)
    app.include_router(reports.operators)
    app.include_router(reports.customers)
    app.include_router(self_service.router)
    _add_operations(app)
    app.openapi = document(app)  # type: ignore[method-assign]
    return app


async def _start(
    app: FastAPI,
    settings: Settings,
    start_engine: StartEngine,
    on_death: Callable[[EngineDied], None],
    stack: AsyncExitStack,
) -> None:
    """Cheap things first: a wrong database URL should not cost a model load."""
    state = app.state
    database = Database(settings.database_url)
    stack.push_async_callback(database.close)
    await database.open()
    blobs = BlobStore(settings.data_dir.absolute(), max_bytes=settings.max_upload_bytes)
    await blobs.open()
    catalog = Catalog(database, blobs.path, reserved={DEFAULT_MODEL, settings.served_model_name})
    removed = await blobs.sweep(await catalog.linked_digests())
    if removed:
        logger.info("removed %d blobs that nothing links to", len(removed))
    state.tenants = Tenants(
        database,
        admin_key=settings.admin_key.get_secret_value() if settings.admin_key else None,
        service_key=settings.service_key.get_secret_value() if settings.service_key else None,
    )
    new_key = await state.tenants.open()
    if new_key is not None:
        print(f"Admin key (shown this once, keep it): {new_key}", file=sys.stderr, flush=True)

    state.shared = None
    if settings.limits_redis_url is not None:
        state.shared = SharedLimits(settings.limits_redis_url.get_secret_value())
        await state.shared.open()
        stack.push_async_callback(state.shared.close)
    recorder = Recorder(database, keep_days=settings.keep_usage_days)
    recorder.start()
    stack.push_async_callback(recorder.stop)
    watching = asyncio.create_task(database.watch(), name="loraplex-watch")
    stack.push_async_callback(_cancel, watching)

    engine = await start_engine(settings)
    stack.push_async_callback(engine.stop)
    metrics = Metrics(tenants=settings.metrics_tenants)
    dispatcher = Dispatcher(engine, _limits(settings, engine), metrics, on_death=on_death)
    dispatcher.start()
    stack.push_async_callback(dispatcher.stop)
    state.engine, state.database, state.blobs, state.metrics = engine, database, blobs, metrics
    state.dispatcher = dispatcher
    state.recorder = recorder

    async def spent_so_far(tenant: str, start: datetime, end: datetime) -> tuple[int, int]:
        await recorder.flush()
        return await spent(database, tenant, start, end)

    quotas = Quotas(
        record=recorder.record,
        spent=spent_so_far,
        prices=settings.prices,
        metrics=metrics,
        shared=state.shared,
    )
    state.completions = Completions(engine, dispatcher, catalog, metrics, quotas)
    state.publishing = Publishing(
        engine,
        dispatcher,
        blobs,
        catalog,
        Receipts(database),
        Prober(engine, dispatcher),
        settings.keep_versions,
    )
    state.started = int(time.time())
    state.versions = await catalog.count_versions()

    def gauges() -> Gauges:
        return dispatcher.gauges(state.versions)

    metrics.watch(gauges)
    for version in await catalog.pinned():
        dispatcher.pin(version, True)
    # vLLM's modules alone are some 700,000 objects that stay; to look at all of them once more would stop
    # every stream for half a second.
    gc.collect()
    gc.freeze()
    sized = engine.capacity.describe(settings.adapter_gpu_memory, settings.adapter_host_memory)
    logger.info("ready: %s; %s", engine.base.name, sized)
    in_background(app, verify_all(state.publishing, metrics))


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def _finish_tasks(app: FastAPI) -> None:
    for task in app.state.tasks:
        task.cancel()
    await asyncio.gather(*app.state.tasks, return_exceptions=True)


async def drain(app: FastAPI) -> None:
    """Not ready at once; what runs may finish until ``drain_timeout``, then it is cut."""
    app.state.draining = True
    dispatcher: Dispatcher | None = getattr(app.state, "dispatcher", None)
    if dispatcher is None:
        return
    dispatcher.drain()
    if not await dispatcher.wait_until_idle(app.state.settings.drain_timeout):
        leases = dispatcher.open_leases()
        logger.warning("cut %d requests that were still running", len(leases))
        await asyncio.gather(*(lease.close("cut") for lease in leases))


def _limits(settings: Settings, engine: Engine) -> Limits:
    return Limits(
        gpu_slots=engine.capacity.gpu_slots,
        host_slots=engine.capacity.host_slots,
        max_running=min(settings.max_running or engine.max_running, engine.max_running),
        max_staging=settings.max_staging,
        slot_patience=settings.slot_patience,
        preempt_after=settings.preempt_after,
        queue_timeout=settings.queue_timeout,
        max_queued=settings.max_queued,
    )


def _add_operations(app: FastAPI) -> None:
    @app.get("/health", tags=["operations"])
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", tags=["operations"])
    async def ready(request: Request) -> JSONResponse:
        state = request.app.state
        checks = {"draining": "yes"} if state.draining else await _checks(state)
        ok = not state.draining and set(checks.values()) == {"ok"}
        return JSONResponse({"status": "ready" if ok else "not ready", "checks": checks}, 200 if ok else 503)

    @app.get("/metrics", tags=["operations"])
    async def metrics(request: Request) -> Response:
        state = request.app.state
        state.versions = await state.publishing.catalog.count_versions()
        return Response(state.metrics.render(), media_type=Metrics.content_type)


async def _checks(state: object) -> dict[str, str]:
    """ "ok" or the reason why not, for the engine, the database, the store, and Redis if limits are there."""
    parts = {
        "engine": state.engine.check,  # type: ignore[attr-defined]
        "database": state.database.ping,  # type: ignore[attr-defined]
        "store": state.blobs.check,  # type: ignore[attr-defined]
    }
    if state.shared is not None:  # type: ignore[attr-defined]
        parts["limits"] = state.shared.check  # type: ignore[attr-defined]
    results = {}
    for name, check in parts.items():
        try:
            async with asyncio.timeout(5):
                await check()
            results[name] = "ok"
        except Exception as exc:  # any reason is a reason
            results[name] = f"{type(exc).__name__}"
            logger.warning("%s is not ready: %s", name, exc)
    return results

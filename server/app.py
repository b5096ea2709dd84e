"""The only place where parts are joined: ``create_app(settings)`` and its lifespan."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from fastapi import FastAPI

from adapters.database.database import Database
from adapters.errors import AdapterError, StorageFailed, cause_of
from adapters.model import DEFAULT_MODEL
from adapters.store.blobs import BlobStore
from adapters.store.cache import Cache
from adapters.store.catalog import Catalog
from adapters.store.fitness import Fitness, Serving
from adapters.store.idempotency import Receipts
from adapters.store.objects import ObjectStore
from adapters.store.ownership import FolderLock, Ownership
from adapters.store.prompts import Prompts
from adapters.store.quarantine import Quarantine
from adapters.store.replicas import Replicas
from adapters.store.rollouts import Rollouts
from adapters.store.suspects import StoredSuspects
from adapters.store.upload_jobs import UploadJobs
from adapters.store.versions import size_of
from server import __version__
from server.accounts.authentication import Authentication
from server.accounts.people import People
from server.accounts.tenants import Tenants
from server.accounts.usage import UsageWriter
from server.accounts.wrong_keys import WrongKeys
from server.batches.runner import runner_of
from server.console import site as console
from server.engine import contract
from server.engine.calls import EngineDied
from server.engine.engine import Engine
from server.engine.restarts import Restarts
from server.engine.templates import close_templates
from server.fleet import internal
from server.fleet.directory import Directory
from server.fleet.gateway import FleetDispatcher, FleetEngine, RemotePublisher
from server.fleet.places import Places
from server.fleet.remote import RemoteAnswers
from server.fleet.replica import Replica
from server.fleet.residency import FleetResidency
from server.fleet.verifying import unverified
from server.http.heap import trimmed
from server.http.middleware import Origins, RequestContext, install_error_handlers
from server.http.openapi import document
from server.http.routes import router_of
from server.http.services import Services
from server.http.verbs import Verbs
from server.inference.completion import Answers, Completions
from server.inference.dialects.registry import DIALECTS
from server.inference.local import LocalAnswers
from server.limits.fallback import ledger_of
from server.limits.quotas import Quotas
from server.limits.redis import RedisLedger
from server.metrics import Metrics
from server.publishing import truth
from server.publishing.intake import Intake
from server.publishing.probe import Prober
from server.publishing.publish import Publishing, verify_all
from server.publishing.quarantine import Faults
from server.rollouts.judge import Judge
from server.rollouts.replay import Replayer
from server.rollouts.runner import looking
from server.rollouts.sampler import Sampler
from server.scheduling.dispatcher import Dispatcher
from server.scheduling.nouns import Capacity
from server.settings import Settings
from server.telemetry.spans import tracer_of

logger = logging.getLogger(__name__)

StartEngine = Callable[[Settings], Awaitable[Engine]]


async def _start_engine(settings: Settings) -> Engine:
    return await Engine.start(settings, DIALECTS)


def create_app(
    settings: Settings,
    *,
    start_engine: StartEngine = _start_engine,
    on_death: Callable[[EngineDied], None] = lambda _: None,
) -> FastAPI:
    """The whole service. ``on_death`` is called once if the engine process goes away."""
    tracer = tracer_of(settings.traces_url, settings.traces_share, settings.role)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with AsyncExitStack() as stack:
            if tracer is not None:
                stack.push_async_callback(tracer.close)
            try:
                app.state.services = services = await _start(settings, start_engine, on_death, stack, app)
                services.tracer = tracer
            except Exception as exc:
                expected = isinstance(exc, ValueError | OSError | AdapterError)
                below = f" ({cause_of(exc)})" if isinstance(exc, StorageFailed) else ""
                logger.critical("cannot start: %s%s", exc, below, exc_info=None if expected else exc)
                raise
            if settings.role != "replica":
                services.batches.start(stack)
            await stack.enter_async_context(trimmed())
            yield {"vouches": services.authentication.vouches}  # for connections
            await services.cancel_tasks()

    app = FastAPI(
        title="Loraplex",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        root_path=settings.root_path,
    )
    app.state.settings = settings
    app.state.services = None
    app.add_middleware(Verbs, routes=app.router.routes)
    app.add_middleware(RequestContext, tracer=tracer)
    app.add_middleware(Origins, allowed=lambda: (app.state.services or app.state).settings.cors_origins)
    install_error_handlers(app)
    app.router.routes.extend(router_of(internal.router if settings.role == "replica" else None).routes)
    if settings.console and settings.role != "replica":
        console.install(app, settings, lambda: app.state.services.authentication.sign_ins)
    app.openapi = document(app)  # type: ignore[method-assign]
    return app


@dataclass(frozen=True, slots=True)
class _Stores:
    """What every role has: what is on disk, in the database and in Redis, and who counts."""

    lock: FolderLock
    database: Database
    blobs: BlobStore
    fitness: Fitness
    catalog: Catalog
    ownership: Ownership
    authentication: Authentication
    redis_ledger: RedisLedger | None
    usage_writer: UsageWriter
    metrics: Metrics
    quotas: Quotas
    cache: Cache | None


async def _open_stores(settings: Settings, stack: AsyncExitStack) -> _Stores:
    """Nothing is touched before the data folder is ours, and no adapter where the database is wrong.

    The processes of a fleet own the folder together, and open it one after another.
    """
    alone = settings.role == "all"
    data_dir = settings.data_dir.absolute()
    lock = FolderLock(data_dir, shared=not alone)
    await asyncio.to_thread(lock.acquire)
    stack.callback(lock.release)
    database = Database(settings.database_url, timeout=settings.database_timeout)
    stack.push_async_callback(database.close)
    blobs = BlobStore(
        data_dir,
        max_bytes=settings.max_upload_bytes,
        objects=ObjectStore(settings.blobs_url) if settings.blobs_url else None,
    )
    fitness = Fitness(blobs)
    catalog = Catalog(
        database,
        blobs.path,
        reserved={DEFAULT_MODEL, settings.served_model_name},
        problem=fitness.problem,
    )
    ownership = Ownership(blobs, database, alone=alone)
    async with AsyncExitStack() as opening:
        turn = lock.alone()
        await asyncio.to_thread(turn.__enter__)
        opening.callback(turn.__exit__, None, None, None)
        await ownership.verify()
        await database.open()
        await blobs.open()
        await ownership.join()
        await ownership.claim()
        authentication = await _authentication(settings, database)
        usage_writer = UsageWriter(database, data_dir, keep_days=settings.keep_usage_days, rolls_up=alone)
        await usage_writer.adopt()
    redis_ledger = await _redis_ledger(settings, stack)
    usage_writer.start()
    stack.push_async_callback(usage_writer.stop)
    if alone:
        stack.push_async_callback(ownership.try_to_remember)
        remembering = asyncio.create_task(ownership.remember_forever(), name="loraplex-remember")
        stack.push_async_callback(_cancel, remembering)
    watching = asyncio.create_task(database.watch(), name="loraplex-watch")
    stack.push_async_callback(_cancel, watching)
    metrics = Metrics(tenants=settings.metrics_tenants, adapters=settings.metrics_adapters)

    stack.push_async_callback(close_templates)

    quotas = Quotas(
        ledger_of(redis_ledger, settings.limits_fail, metrics.limited_locally),
        record=usage_writer.record,
        record_refused=usage_writer.refused,
        spent=usage_writer.spent,
        prices=settings.prices,
        metrics=metrics,
    )
    cache = None
    if blobs.objects is not None:
        cache = Cache(blobs, settings.blobs_cache, fitness, metrics.fetched)
    return _Stores(
        lock,
        database,
        blobs,
        fitness,
        catalog,
        ownership,
        authentication,
        redis_ledger,
        usage_writer,
        metrics,
        quotas,
        cache,
    )


async def _sweep(stores: _Stores, *, shared: bool = False) -> None:
    kept = await stores.catalog.linked_digests() | stores.ownership.kept
    removed = await stores.blobs.sweep(kept, shared=shared)
    if removed:
        logger.info("removed %d blobs that nothing links to: %s", len(removed), ", ".join(removed))


async def _start(
    settings: Settings,
    start_engine: StartEngine,
    on_death: Callable[[EngineDied], None],
    stack: AsyncExitStack,
    app: FastAPI,
) -> Services:
    """Cheap things first: a wrong database URL should not cost a model load."""
    stores = await _open_stores(settings, stack)
    if settings.role == "gateway":
        return await _start_gateway(settings, stores, stack)
    if settings.role == "all":
        await _sweep(stores)
    catalog, metrics = stores.catalog, stores.metrics
    owner = settings.reached_at if settings.role == "replica" else ""
    suspects = await StoredSuspects(stores.database, owner).open()
    stack.push_async_callback(suspects.stop)
    engine = await start_engine(settings)
    stack.push_async_callback(engine.stop)
    fitness = stores.fitness
    await fitness.open(Serving(engine.base, engine.lora_dtype, __version__, settings.same_bases))
    stack.push_async_callback(fitness.save)

    faults = Faults()

    def on_fault(key: str, reason: str) -> None:
        work = faults.quarantine(services.publishing.quarantine, catalog, dispatcher, key, reason)
        services.in_background(work, lasting=True)

    cache = stores.cache
    dispatcher = Dispatcher(
        engine,
        _capacity(settings, engine),
        metrics,
        on_death=on_death,
        stall=settings.engine_stall,
        restarts=Restarts(settings.engine_restarts),
        on_fault=on_fault,
        on_suspects=suspects.note,
        suspects=suspects.versions,
        on_losses=suspects.note_losses,
        losses=suspects.losses,
        preparation=cache or fitness,
    )
    if cache is not None:
        cache.in_use = dispatcher.known_digests
        await cache.open()
    dispatcher.start()
    stack.push_async_callback(dispatcher.stop)
    answers = LocalAnswers(engine, dispatcher, metrics, cache)
    publishing = Publishing(
        engine,
        dispatcher,
        stores.blobs,
        catalog,
        Receipts(stores.database),
        Prober(engine, dispatcher),
        Quarantine(stores.database),
        fitness,
        UploadJobs(stores.database),
        settings.keep_versions,
        settings.max_versions,
        shared=settings.role != "all",
    )
    services = _services(settings, stores, engine, dispatcher, answers, publishing)
    engine.on_fault = on_fault
    await _hold_all(services, fitness, stack)
    # vLLM's modules alone are some 700,000 objects that stay; to look at all of them once more would stop
    # every stream for half a second.
    gc.collect()
    gc.freeze()
    sized = engine.capacity.describe(settings.adapter_gpu_memory, settings.adapter_host_memory)
    logger.info("ready: %s; %s", engine.base.name, sized)
    if settings.role == "replica":
        app.state.replica = await _join_fleet(settings, stores, services, answers, stack)
        return services
    for version in await catalog.pinned():
        dispatcher.pin(version, version.quarantine is None and fitness.problem(version) is None)
    services.in_background(verify_all(services.publishing, metrics))
    await stack.enter_async_context(looking(services.judge))
    return services


def _services(
    settings: Settings,
    stores: _Stores,
    engine: Engine,
    dispatcher: Dispatcher,
    answers: Answers,
    publishing: Publishing,
) -> Services:
    key = settings.rollout_key
    sampler = Sampler(Prompts(stores.database), key.get_secret_value() if key else None)
    completions = Completions(answers, stores.catalog, stores.metrics, stores.quotas, sampler)
    replayer = Replayer(sampler, completions, stores.authentication, engine)
    return Services(
        settings=settings,
        database=stores.database,
        blobs=stores.blobs,
        tenants=Tenants(stores.database),
        people=People(stores.database),
        authentication=stores.authentication,
        wrong_keys=WrongKeys(settings.auth_failures),
        redis_ledger=stores.redis_ledger,
        usage_writer=stores.usage_writer,
        engine=engine,
        metrics=stores.metrics,
        dispatcher=dispatcher,
        completions=completions,
        batches=runner_of(settings, stores.database, completions, stores.authentication, dispatcher),
        publishing=publishing,
        judge=Judge(Rollouts(stores.database), publishing, replayer),
        intake=Intake(
            settings.written_folders(),
            partial(size_of, stores.database),
            most=settings.max_uploads,
            each=settings.max_uploads_each,
            reserve=settings.disk_reserve,
        ),
        replicas=Replicas(stores.database),
        cache=stores.cache,
        started=int(time.time()),
    )


async def _join_fleet(
    settings: Settings, stores: _Stores, services: Services, answers: LocalAnswers, stack: AsyncExitStack
) -> Replica:
    async def chores() -> None:
        await _sweep(stores, shared=True)
        await stores.usage_writer.roll_up()
        if not services.verifying:  # or the replica is at it
            await verify_all(services.publishing, stores.metrics)

    replica = Replica(
        services,
        answers,
        services.replicas,
        key=_fleet_key(settings),
        url=settings.reached_at,
        chores=chores,
        remember=stores.ownership.try_to_remember,
    )
    stack.push_async_callback(replica.stop)
    services.on_drain = replica.drain
    services.verifying = bool(await unverified(services))
    return replica


async def _start_gateway(settings: Settings, stores: _Stores, stack: AsyncExitStack) -> Services:
    await asyncio.to_thread(contract.check, packages=contract.WITHOUT_ENGINE)
    directory = Directory(
        Replicas(stores.database), stores.metrics, key=_fleet_key(settings), stall=settings.replica_stall
    )
    await directory.start()
    stack.push_async_callback(directory.stop)
    places = Places(stores.quotas.ledger, timeout=settings.queue_timeout, max_queued=settings.max_queued)
    answers = RemoteAnswers(directory, stores.metrics, places)
    # Their types are those of a process with an engine; see ``server.fleet.gateway`` for what they answer.
    engine: Any = FleetEngine(directory)
    dispatcher: Any = FleetDispatcher(directory, answers)
    publishing = Publishing(
        engine,
        dispatcher,
        stores.blobs,
        stores.catalog,
        Receipts(stores.database),
        cast("Any", None),  # a replica probes
        Quarantine(stores.database),
        stores.fitness,
        UploadJobs(stores.database),
        settings.keep_versions,
        settings.max_versions,
        shared=True,
        elsewhere=RemotePublisher(directory, stores.blobs),
    )
    services = _services(settings, stores, engine, dispatcher, answers, publishing)
    services.peers = FleetResidency(directory, answers.places.waiting)
    if stores.cache is not None:
        services.in_background(stores.cache.open())
    logger.info("ready: a gateway, with %d replicas", len(directory.all()))
    await stack.enter_async_context(looking(services.judge, services.replicas))
    return services


def _fleet_key(settings: Settings) -> str:
    assert settings.fleet_key is not None, "the settings see to it"
    return settings.fleet_key.get_secret_value()


async def _hold_all(services: Services, fitness: Fitness, stack: AsyncExitStack) -> None:
    """Versions against the engine of now; for ``truth.START_S`` seconds, and then beside the requests."""
    database, path_of = services.database, services.blobs.path
    holding = services.in_background(truth.hold_all(fitness, database, path_of))
    await asyncio.wait([holding], timeout=truth.START_S)
    forever = [truth.look_again(fitness, database)]
    if (rate := services.settings.scrub_rate) > 0:
        forever.append(truth.scrub(fitness, database, path_of, rate))
    for work in forever:
        stack.push_async_callback(_cancel, asyncio.create_task(work))


async def _authentication(settings: Settings, database: Database) -> Authentication:
    """Prints the admin key where it has just been made: nobody can read it later."""
    authentication = Authentication(
        database,
        admin_key=settings.admin_key.get_secret_value() if settings.admin_key else None,
        service_key=settings.service_key.get_secret_value() if settings.service_key else None,
        metrics_key=settings.metrics_key.get_secret_value() if settings.metrics_key else None,
    )
    new_key = await authentication.open()
    if new_key is not None:
        print(f"Admin key (shown this once, keep it): {new_key}", file=sys.stderr, flush=True)
    return authentication


async def _redis_ledger(settings: Settings, stack: AsyncExitStack) -> RedisLedger | None:
    if settings.limits_redis_url is None:
        return None
    here = settings.limits_fail == "open"
    outage = "limits hold in each process" if here else "requests with limits get 503"
    ledger = RedisLedger(settings.limits_redis_url.get_secret_value(), outage=outage)
    await ledger.open()
    stack.push_async_callback(ledger.stop)
    return ledger


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


def listening(app: FastAPI) -> None:
    """The server takes connections: a replica announces itself now, as gateways ask it at once."""
    if (replica := getattr(app.state, "replica", None)) is not None:
        replica.start()


async def drain(app: FastAPI) -> None:
    """``Services.drain``; nothing where the server has not started."""
    services: Services | None = app.state.services
    if services is not None:
        await services.drain()


def _capacity(settings: Settings, engine: Engine) -> Capacity:
    return Capacity(
        gpu_slots=engine.capacity.gpu_slots,
        host_slots=engine.capacity.host_slots,
        max_running=min(settings.max_running or engine.max_running, engine.max_running),
        max_staging=settings.max_staging,
        slot_patience=settings.slot_patience,
        preempt_after=settings.preempt_after,
        queue_timeout=settings.queue_timeout,
        max_queued=settings.max_queued,
        slot_ranks=engine.capacity.slot_ranks,
    )

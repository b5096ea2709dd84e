"""A fleet that Ray Serve places, watches, starts again, updates and scales. Needs the extra ``ray``.

    loraplex fleet up --ray            on this machine, or on the cluster that RAY_ADDRESS names
    serve run config/ray.yml          the same by Serve's own tools

    Serve's controller ─▶ actor "Replica" × N ─▶ its process: ROLE=replica, on a free port of its node
                       └▶ actor "Gateway" × M ─▶ its process: ROLE=gateway, on PORT of its node

An actor starts one process of this program, says whether it is well, and stops it: it carries no request.
Clients ask gateways, and gateways ask replicas, over HTTP as everywhere; by a handle of Serve's each token
would cost ten times the processor time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from server.engine import guard
from server.fleet.reports import READY, Report
from server.fleet.scaling import Bounds, Scaler, pressure
from server.fleet.wire import PREFIX
from server.settings import Settings
from server.settings.addresses import family_of, from_here, is_every, url_of

logger = logging.getLogger(__name__)

NAME = "loraplex"
COMMAND = (sys.executable, "-m", "server", "serve")
# A large model comes from a cold disk; a process that answers nothing for so long is replaced. In seconds.
STARTED_WITHIN_S, SILENT_S = 1800.0, 60.0
POLL_S, ANSWERS_WITHIN_S = 0.5, 10.0
# Beyond DRAIN_TIMEOUT, for the engine to stop.
STOP_MARGIN_S = 30.0
# How old a report may be that replicas are counted by.
LOOK_BACK_S = 15.0


class Plan(BaseModel):
    """What is to run: the arguments of ``app``.

    ``replicas`` run always, ``most`` at most. ``gpus`` are those of one replica, together on one node: as
    many as its engine's ``tensor_parallel_size``. ``target`` and ``calm`` as in ``server.fleet.scaling``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    replicas: int = Field(2, ge=1)
    most: int | None = Field(None, ge=1)
    gateways: int = Field(1, ge=1)
    gpus: int = Field(0, ge=0)
    cpus: float = Field(1.0, ge=0)
    target: float = Field(0.7, gt=0, le=1)
    calm: float = Field(600.0, ge=0)

    @property
    def bounds(self) -> Bounds:
        """For the number of replicas."""
        most = max(self.replicas, self.most or 0)
        return Bounds(least=self.replicas, most=most, target=self.target, calm=self.calm)


class Member:
    """One process of the fleet, as an actor of Serve's. It is ready when the actor is made."""

    role = ""
    looks_at = "/health"

    async def __init__(  # type: ignore[misc]  # Serve waits for it
        self, command: Sequence[str], settings: Mapping[str, str], drain: float
    ) -> None:
        self._patience = drain + STOP_MARGIN_S
        self._host, self._port = self._address(settings)
        await self._until_free()
        guard.start()  # nothing outlives the actor, however that ends
        own = {"ROLE": self.role, "PORT": str(self._port), **self._own()}
        environment = {**os.environ, **settings, **{f"LORAPLEX_{name}": own[name] for name in own}}
        if "OMP_NUM_THREADS" not in settings:
            environment.pop("OMP_NUM_THREADS", None)  # Ray's, for the actor alone
        if os.nice(0) > 0:
            logger.warning("Ray runs this at nice %d: set RAY_worker_niceness=0 on its nodes", os.nice(0))
        # Not one of the loop's: Serve's last call comes to a thread that does not run it.
        self._process = subprocess.Popen(  # noqa: ASYNC220, S603
            command, env=environment, start_new_session=True
        )
        self._heard = time.monotonic()
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWERS_WITHIN_S))
        await self._until_ready()

    async def check_health(self) -> None:
        """Raises where the process has ended, or is silent. One that is not ready heals itself, or ends."""
        if (status := self._process.poll()) is not None:
            raise RuntimeError(f"the {self.role}'s process ended with {status}")
        if await self._status() is None and time.monotonic() - self._heard > SILENT_S:
            raise RuntimeError(f"the {self.role} has been silent for {SILENT_S:.0f} s")

    def __del__(self) -> None:
        """Serve's last call: what runs is drained. May be repeated."""
        process: subprocess.Popen[bytes] | None = getattr(self, "_process", None)
        if process is None or process.poll() is not None:
            return
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self._patience)
            return
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _address(self, settings: Mapping[str, str]) -> tuple[str, int]:
        raise NotImplementedError

    def _own(self) -> dict[str, str]:
        return {}

    async def _until_free(self) -> None:
        """Waits until the port is free: a replica that is being replaced may still end its answers on it."""
        deadline = time.monotonic() + self._patience
        while not _is_free(self._host, self._port):
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"port {self._port} of {self._host} is taken, or that is no address of this node"
                )
            await asyncio.sleep(POLL_S)

    async def _until_ready(self) -> None:
        began = time.monotonic()
        while await self._status() != 200:
            if (status := self._process.poll()) is not None:
                raise RuntimeError(f"the {self.role}'s process ended with {status}; see its log")
            if time.monotonic() - began > STARTED_WITHIN_S:
                raise RuntimeError(f"the {self.role} was not ready after {STARTED_WITHIN_S:.0f} s")
            await asyncio.sleep(POLL_S)

    async def _status(self) -> int | None:
        """The replica's answer to a look at its health; None if it gives none."""
        try:
            async with self._session.get(f"{self._url}{self.looks_at}") as answer:
                self._heard = time.monotonic()
                return answer.status
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None

    @property
    def _url(self) -> str:
        return url_of(self._host, self._port)


class Replica(Member):
    """With an engine; ``/ready`` asks it."""

    role = "replica"
    looks_at = "/ready"

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For ``Policy``, every few seconds. Nothing presses on one that is starting again or about to go."""
        headers = {"Authorization": f"Bearer {self._key}"}
        try:
            async with self._session.get(f"{self._url}{PREFIX}/state", headers=headers) as answer:
                told = await answer.json()
                report = Report.of("", told["report"], backlog=told["backlog"])
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError):
            return {"pressure": 0.0}
        return {"pressure": pressure(report) if report.state == READY else 0.0}

    def _address(self, settings: Mapping[str, str]) -> tuple[str, int]:
        self._key = settings["LORAPLEX_FLEET_KEY"]
        host = str(ray.util.get_node_ip_address())
        with socket.socket(family_of(host)) as probe:
            probe.bind((host, 0))
            return host, int(probe.getsockname()[1])

    def _own(self) -> dict[str, str]:
        return {"HOST": self._host, "REPLICA_URL": self._url}


class Gateway(Member):
    """One on a node. ``replicas`` is not asked: it makes them a part of the application."""

    role = "gateway"

    async def __init__(  # type: ignore[misc]
        self, command: Sequence[str], settings: Mapping[str, str], drain: float, replicas: Any
    ) -> None:
        await super().__init__(command, settings, drain)

    async def __call__(self, request: Any) -> dict[str, str]:
        """Where clients find it, for who asks Serve's own proxy."""
        host = ray.util.get_node_ip_address() if self._is_everywhere else self._host
        return {"gateway": url_of(host, self._port)}

    def _address(self, settings: Mapping[str, str]) -> tuple[str, int]:
        host = settings["LORAPLEX_HOST"]
        self._is_everywhere = is_every(host)
        return from_here(host), int(settings["LORAPLEX_PORT"])


class Policy:
    """Serve's controller asks it how many replicas there should be; ``bounds`` are those of a ``Plan``."""

    def __init__(self, **bounds: Any) -> None:
        self._scaler = Scaler(Bounds(**bounds))

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """By the newest report of each replica that runs."""
        told = (context.raw_metrics or {}).get("pressure", {})
        latest = [told[one][-1].value for one in context.running_replicas if told.get(one)]
        wanted = self._scaler.wanted_for(time.monotonic(), sum(latest), context.target_num_replicas)
        # It is asked ten times a second, and what is coming does not take its share yet.
        return min(wanted, max(context.target_num_replicas, 2 * len(context.running_replicas))), {}


def application(
    settings: Settings, plan: Plan, *, config: Path | None = None, command: Sequence[str] = COMMAND
) -> Any:
    """The whole fleet as an application of Serve's, with the ``LORAPLEX_*`` variables of this process."""
    key = settings.fleet_key.get_secret_value() if settings.fleet_key else secrets.token_urlsafe(32)
    shared = {name: value for name, value in os.environ.items() if name.startswith("LORAPLEX_")} | {
        "LORAPLEX_FLEET_KEY": key,
        "LORAPLEX_HOST": settings.host,
        "LORAPLEX_PORT": str(settings.port),
        "LORAPLEX_DATA_DIR": str(settings.data_dir.absolute()),
    }
    if Path(settings.model).exists():
        shared["LORAPLEX_MODEL"] = str(Path(settings.model).absolute())
    options = ["--config", str(config.absolute())] if config is not None else []
    given = [*command, *options], shared, settings.drain_timeout
    common = {
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 2 * ANSWERS_WITHIN_S,
        "graceful_shutdown_timeout_s": settings.drain_timeout + 2 * STOP_MARGIN_S,
    }
    actor = {"num_cpus": plan.cpus, "num_gpus": plan.gpus}
    replicas = serve.deployment(Replica).options(**common, **_number(plan), ray_actor_options=actor)
    gateway = serve.deployment(Gateway).options(
        **common, num_replicas=plan.gateways, max_replicas_per_node=1, ray_actor_options={"num_cpus": 0}
    )
    return gateway.bind(*given, replicas.bind(*given))


def _number(plan: Plan) -> dict[str, Any]:
    bounds = plan.bounds
    if bounds.least == bounds.most:
        return {"num_replicas": bounds.least}
    # Without ``initial_replicas``, to which Serve would go back with every update, however many run.
    told = {"least": bounds.least, "most": bounds.most, "target": bounds.target, "calm": bounds.calm}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=bounds.least,
            max_replicas=bounds.most,
            look_back_period_s=LOOK_BACK_S,
            upscale_delay_s=0,  # how long to wait is the policy's
            downscale_delay_s=0,
            policy=AutoscalingPolicy(policy_function=Policy, policy_kwargs=told),
        )
    }


def app(args: dict[str, Any]) -> Any:
    """What ``serve run server.fleet.ray:app replicas=2 …`` builds; ``args`` are those of ``Plan``."""
    return application(Settings.load(None), Plan.model_validate(args))


def up(settings: Settings, plan: Plan, config: Path | None = None) -> int:
    """Runs the fleet until SIGINT or SIGTERM, in the cluster of RAY_ADDRESS or in one of its own."""
    stopping = threading.Event()
    with connected():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: stopping.set())
        serve.start(proxy_location="Disabled")  # clients ask gateways
        serve.run(application(settings, plan, config=config), name=NAME, route_prefix=None)
        print(f"fleet: serving on port {settings.port}", file=sys.stderr, flush=True)
        while not stopping.wait(1.0):
            pass
        serve.delete(NAME)
    return 0


@contextlib.contextmanager
def connected() -> Any:
    """To the cluster of RAY_ADDRESS; without it to one on this machine, which ends with the block."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own is 15: the engine would starve
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    root = str(Path(__file__).parents[2])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root not in paths:  # actors, and what they start, import this program
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, *paths]))
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address=address)
    else:
        ray.init(address="local", include_dashboard=False)
    try:
        yield
    finally:
        if not address:
            serve.shutdown()
        ray.shutdown()


def _is_free(host: str, port: int) -> bool:
    with socket.socket(family_of(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True

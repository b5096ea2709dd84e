"""How `make test` divides the tests between its processes."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

# Before torch is imported. Processes run side by side, and two threads that spin for each other take up to
# ten times the processor time of one. Engines set their own number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

# An example may take as long as it takes, and so may making one: a busy machine is not a fault.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

ENGINE = "tests/engine/"
# These start engines of their own and leave the shared one alone, so that they can run beside it. The longest
# come first.
OWN_ENGINE = (
    "test_healing.py",
    "test_zoo.py",
    "test_fleet.py",
    "test_truth.py",
    "test_tools.py",
    "test_two_workers.py",
    "test_process.py",
    "test_embeddings.py",
    "test_thinking.py",
)
# An engine keeps a core busy, its process and the server's half of another.
ENGINES_AT_ONCE = 2
ENGINE_TEST_S = 1800


def pytest_configure() -> None:
    if (number := os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")).isdigit():
        # By itself each of two engines would bind its worker to the last core.
        cores = sorted(os.sched_getaffinity(0))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(cores[-1 - int(number) % len(cores)]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    """Before the first of the processes is started."""
    if os.environ.get("TESTS_FORK_ENGINES"):
        from tests.support.forked_workers import fork_workers

        fork_workers([str(one) for one in config.invocation_params.args])
        if "tests" in config.args:
            _prepare_base(config)


def _prepare_base(config: pytest.Config) -> None:
    """On the core that has nothing to do while one process collects; whoever needs it sooner waits for it."""
    from server.demo.base import cache_folder, is_prepared

    if is_prepared(cache_folder()):
        return
    preparing = "from server.demo.base import cache_folder, prepare; prepare(cache_folder())"
    quiet = subprocess.DEVNULL  # what goes wrong is told by the tests that ask for the base
    process = subprocess.Popen(
        [sys.executable, "-c", preparing], cwd=config.rootpath, stdout=quiet, stderr=quiet
    )

    def ended() -> None:
        process.wait()

    config.add_cleanup(ended)


class Layers(LoadFileScheduling):
    """A file is run by one process, and all files that share an engine are run by the same one.

    The first ``ENGINES_AT_ONCE`` processes take what needs an engine first, the others what needs none.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = str(super()._split_scope(nodeid))
        shared = file.startswith(ENGINE) and file.removeprefix(ENGINE) not in OWN_ENGINE
        return ENGINE if shared else file

    def _assign_work_unit(self, node: Any) -> None:
        with_engine = int(node.gateway.id.removeprefix("gw")) < ENGINES_AT_ONCE
        scope = next((it for it in self.workqueue if it.startswith(ENGINE) == with_engine), None)
        if scope is not None:
            self.workqueue.move_to_end(scope, last=False)
        super()._assign_work_unit(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Layers | None:
    """What `--dist loadfile` means here; None leaves other values to xdist."""
    if config.getoption("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # but as below
    return Layers(config, log)  # type: ignore[arg-type]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest first where several processes share them, so that none is left with one at the end.

    Those on a real engine may take longer than others: beside much else a start alone takes minutes.
    """
    for item in items:
        if item.nodeid.startswith(ENGINE) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(ENGINE_TEST_S))
    if os.environ.get("PYTEST_XDIST_WORKER"):
        items.sort(key=lambda item: _turn(item.nodeid))


def _turn(nodeid: str) -> tuple[int, int]:
    if not nodeid.startswith(ENGINE):
        return 2, nodeid.startswith("tests/pure/")
    file = nodeid.removeprefix(ENGINE).split("::")[0]
    return (1, OWN_ENGINE.index(file)) if file in OWN_ENGINE else (0, 0)

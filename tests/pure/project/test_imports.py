"""Who may import whom, by folder. ``docs/architecture.md`` draws it."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

# From the top down: a room imports itself and strictly lower floors. A room is a folder,
# or a file that stands alone.
FLOORS: list[set[str]] = [
    {"server.__main__"},
    {"server.app", "server.cli", "server.demo"},
    {"server.fleet"},
    {"server.http", "server.console"},
    {"server.batches", "server.rollouts"},  # rollouts: above publishing, whose probes it asks for
    {"server.inference", "server.publishing"},
    {"server.limits"},
    {"server.scheduling"},
    {"server.engine", "server.accounts"},
    {"server.metrics"},
    {"server.telemetry", "server.logs"},
    {"server.settings", "server.errors"},
    {"server"},
    {"adapters.offline", "adapters.store", "adapters.worker"},
    {"adapters.inspection", "adapters.database"},
    {"adapters.awake", "adapters.errors", "adapters.files", "adapters.model", "adapters.tasks"},
    {"adapters.split"},
    {"adapters"},
]
# Rooms that no other room on the floors between may enter, and whom they are for.
ONLY_FOR = {
    "server.cli": {"server.__main__"},
    "server.console": {"server.app"},
    "server.demo": {"server.__main__"},
    "adapters.offline": {"server.cli"},
    "adapters.worker": {"server.engine"},
}
# A library that is known in these rooms only.
ONLY_IN = {
    "aiohttp": {"server.fleet"},
    "cryptography": {"server.rollouts"},
    "fastapi": {"server.app", "server.fleet", "server.http"},  # fleet: what a replica answers to gateways
    "starlette": {"server.fleet", "server.http", "server.console", "server.engine"},
    "jinja2": {"server.console"},
    "authlib": {"server.console"},
    "joserfc": {"server.console"},
    "uvicorn": {"server.__main__", "server.http"},
    "rich": {"server.__main__", "server.cli", "server.demo"},
    "typer": {"server.__main__", "server.cli"},
    "prometheus_client": {"server.metrics"},
    "obstore": {"adapters.store"},
    "opentelemetry": {"server.telemetry"},
    "ray": {"server.fleet"},
    "redis": {"server.limits"},
    "sqlalchemy": {"adapters.database", "adapters.store", "server.accounts", "server.settings"},
    "torch": {
        "adapters.inspection",
        "adapters.offline",
        "adapters.worker",
        "server.demo",
        "server.engine",
    },
    "transformers": {"adapters.inspection", "adapters.offline", "server.cli", "server.demo"},
    "peft": {"adapters.offline", "server.demo"},
    "vllm": {"adapters.worker", "server.engine"},
    "xgrammar": {"server.engine"},
}
# Decisions are pure: no clock, no loop, no engine.
PURE = {
    "adapters.inspection.logprobs",
    "adapters.split",
    "server.engine.restarts",
    "server.engine.sizing",
    "server.fleet.facts",
    "server.fleet.placement",
    "server.fleet.rendezvous",
    "server.fleet.reports",
    "server.fleet.spare",
    "server.telemetry.pace",
    "server.limits.budget",
    "server.limits.ledger",
    "server.limits.permissions",
    "server.limits.rate",
    "server.rollouts.evidence",
    "server.rollouts.guards",
    "server.rollouts.late",
    "server.rollouts.plan",
    "server.scheduling.checkpoints",
    "server.scheduling.fair_queue",
    "server.scheduling.indices",
    "server.scheduling.loads",
    "server.scheduling.nouns",
    "server.scheduling.plan",
    "server.scheduling.prefetch",
    "server.scheduling.ranking",
    "server.scheduling.reconcile",
    "server.scheduling.event_log",
    "server.scheduling.residency",
    "server.scheduling.residency_checks",
    "server.scheduling.suspects",
    "server.scheduling.victims",
}
IMPURE = {
    "asyncio",
    "logging",
    "os",
    "random",
    "server.engine.engine",
    "server.engine.metered",
    "server.engine.serving",
    "server.metrics",
    "threading",
    "time",
}


def modules(package: str) -> dict[str, Path]:
    """Module -> file, without the migrations, which Alembic runs."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        if "migrations" not in path.parts:
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


EVERY = modules("server") | modules("adapters")
FLOOR = {room: depth for depth, floor in enumerate(FLOORS) for room in floor}


def room_of(module: str) -> str:
    """``server.limits.redis`` -> ``server.limits``; the package itself for its ``__init__``."""
    return ".".join(module.split(".")[:2])


@functools.cache
def imports(path: Path) -> tuple[str, ...]:
    """Every module that ``path`` imports, at its top or inside a function."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            inner = [name for name in submodules if name in EVERY]
            yield from inner
            if len(inner) < len(submodules):
                yield str(node.module)


def is_below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_every_room_has_a_floor() -> None:
    assert set(FLOOR) == {room_of(module) for module in EVERY}


@pytest.mark.parametrize("module", EVERY)
def test_imports_go_downwards(module: str) -> None:
    here = room_of(module)
    for imported in imports(EVERY[module]):
        assert not is_below(imported, "tests"), f"{module} imports {imported}"
        room = room_of(imported)
        if room not in FLOOR or room == here:
            continue
        assert FLOOR[room] > FLOOR[here], f"{module} imports {imported}"
        assert here in ONLY_FOR.get(room, {here}), f"{module} imports {imported}"


def test_no_module_imports_itself_on_a_way_round() -> None:
    """Within a room too. What a function imports counts as well: it would only hide the circle."""
    graph = {module: {name for name in imports(path) if name in EVERY} for module, path in EVERY.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for imported in sorted(graph[module]):
                visit(imported, (*way, module))
            done.add(module)

    for module in EVERY:
        visit(module, ())


@pytest.mark.parametrize("module", EVERY)
def test_some_things_are_known_in_some_rooms_only(module: str) -> None:
    for imported in imports(EVERY[module]):
        for package, allowed in ONLY_IN.items():
            known = not is_below(imported, package) or room_of(module) in allowed
            assert known, f"{module} imports {imported}"
        if module in PURE:
            assert not any(is_below(imported, package) for package in IMPURE), f"{module} imports {imported}"


@pytest.mark.parametrize("path", sorted((ROOT / "server" / "demo").glob("*.py")), ids=lambda path: path.stem)
def test_the_demo_is_a_client_of_the_server(path: Path) -> None:
    for imported in imports(path):
        if is_below(imported, "server") and not is_below(imported, "server.demo"):
            assert imported in ("server.settings", "server"), f"{path.stem} imports {imported}"


def test_reading_the_settings_is_cheap() -> None:
    """The command line answers at once: what takes seconds to import is imported by who needs it."""
    import subprocess

    script = (
        "import sys, server.__main__, server.settings\n"
        "slow = ('vllm', 'torch', 'transformers', 'fastapi', 'sqlalchemy.orm')\n"
        "print([module for module in slow if module in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

"""Imports go downwards. The levels are those of the design; within a level nobody imports a neighbour."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the top down; a module may import from lower levels only.
LEVELS: list[set[str]] = [
    {"server.__main__"},
    {"server.app", "server.commands", "server.offline"},
    {"server.document", "server.records", "server.reports", "server.selfservice"},
    {"server.api", "server.admin", "server.protocol", "server.top"},
    {"server.sources"},
    {"server.http", "server.imports", "server.multipart"},
    {"server.embeddings"},
    {"server.complete", "server.publish"},
    {"server.probe", "server.quotas"},
    {"server.dispatcher"},
    {"server.plan"},
    {"server.residency"},
    {"server.fairness"},
    {"server.warming"},
    {"server.ranking", "server.tiers"},
    {"server.usage"},
    {"server.engine", "server.tenants", "server.metrics", "server.logs", "server.shared"},
    {"server.budgets", "server.command", "server.keys"},
    {"server.dialects", "server.fields"},
    {
        "server.errors",
        "server.handlers",
        "server.limits",
        "server.settings",
        "server.shapes",
        "server.remote",
        "server.show",
    },
    {"server.sizing"},
    {"server"},
    {"adapters.admit", "adapters.doctor", "adapters.merge", "adapters.training"},
    {"adapters.archives", "adapters.convert"},
    {"adapters.catalog", "adapters.blobs", "adapters.inspect", "adapters.worker"},
    {"adapters.audit", "adapters.golden", "adapters.host_memory", "adapters.receipts"},
    {
        "adapters.cpu_kernels",
        "adapters.executor",
        "adapters.onednn",
        "adapters.peft_config",
        "adapters.processor",
        "adapters.safetensors_header",
        "adapters.shapes",
        "adapters.tables",
    },
    {"adapters.strict_json", "adapters.targets", "adapters.values"},
    {"adapters.names"},
    {"adapters.errors", "adapters.model", "adapters.probes"},
    {"adapters.split"},
    {"adapters"},
]
# Decisions are pure: no clock, no loop, no engine.
PURE = {
    "server.budgets",
    "server.limits",
    "server.plan",
    "server.fairness",
    "server.residency",
    "server.ranking",
    "server.tiers",
    "server.warming",
    "server.sizing",
    "adapters.probes",
    "adapters.split",
}
IMPURE = {"asyncio", "time", "random", "threading", "os", "logging", "server.engine", "server.metrics"}
ONLY_IN = {
    "prometheus_client": {"server.metrics"},
    "vllm": {
        "server.engine",
        "server.handlers",
        "adapters.cpu_kernels",
        "adapters.executor",
        "adapters.onednn",
        "adapters.worker",
    },
    "sqlalchemy": {
        "server.tenants",
        "server.settings",
        "server.usage",
        "adapters.audit",
        "adapters.catalog",
        "adapters.receipts",
        "adapters.tables",
    },
    "torch": {
        "adapters.convert",
        "adapters.cpu_kernels",
        "adapters.host_memory",
        "adapters.inspect",
        "adapters.merge",
        "adapters.onednn",
        "adapters.processor",
        "adapters.shapes",
        "adapters.training",
        "adapters.values",
        "adapters.worker",
        "server.shapes",
    },
}
NEVER_IN_ADAPTERS = {"server", "fastapi", "starlette", "prometheus_client"}


def modules(package: str) -> dict[str, Path]:
    """Module -> file, without the demo and the migrations, which are programs of their own."""
    found = {}
    for path in sorted((ROOT / package).glob("*.py")):
        found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


EVERY = modules("server") | modules("adapters")
LEVEL = {module: depth for depth, level in enumerate(LEVELS) for module in level}


def imports(path: Path) -> Iterator[str]:
    """Every module that ``path`` imports, at its top or inside a function."""
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


def test_every_module_has_a_level() -> None:
    assert set(LEVEL) == set(EVERY)


@pytest.mark.parametrize("module", EVERY)
def test_imports_go_downwards(module: str) -> None:
    for imported in imports(EVERY[module]):
        if imported in LEVEL:
            assert LEVEL[imported] > LEVEL[module], f"{module} imports {imported}"
        elif is_below(imported, "server.demo"):
            assert module == "server.__main__"
        else:
            assert not is_below(imported, "server"), f"{module} imports {imported}"
            assert not is_below(imported, "tests"), f"{module} imports {imported}"


@pytest.mark.parametrize("module", EVERY)
def test_some_things_are_known_in_one_place_only(module: str) -> None:
    for imported in imports(EVERY[module]):
        for package, allowed in ONLY_IN.items():
            assert not is_below(imported, package) or module in allowed, f"{module} imports {imported}"
        if is_below(module, "adapters"):
            assert not any(is_below(imported, package) for package in NEVER_IN_ADAPTERS)
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

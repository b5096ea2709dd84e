"""How `make test` divides the tests: what shares an engine is run by one process."""

from __future__ import annotations

import ast
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import ENGINE, OWN_ENGINE, Layers

FOLDER = Path(__file__).parents[2] / "engine"
# Of tests/engine/conftest.py.
SHARED = {"site", "quiet"}


def scope(nodeid: str) -> str:
    return Layers._split_scope(Layers.__new__(Layers), nodeid)


def test_files_that_share_an_engine_stay_together() -> None:
    assert (
        scope("tests/engine/test_exact.py::test_a[x::y]")
        == scope("tests/engine/test_probe.py::test_b")
        == ENGINE
    )
    assert scope("tests/engine/test_zoo.py::test_a") == "tests/engine/test_zoo.py"
    assert scope("tests/pure/server/test_errors.py::TestOne::test_a") == "tests/pure/server/test_errors.py"


class Process:
    """One of xdist's, as far as it is given work: ``took`` has the tests' numbers."""

    def __init__(self, number: int) -> None:
        self.gateway = SimpleNamespace(id=f"gw{number}")
        self.took: list[int] = []

    def send_runtest_some(self, numbers: list[int]) -> None:
        self.took += numbers


@pytest.mark.parametrize(
    ("number", "takes"), [(0, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (2, [2, 3, 0, 1])], ids=["gw0", "gw1", "gw2"]
)
def test_only_two_processes_look_for_engines_first(number: int, takes: list[int]) -> None:
    files = ["tests/engine/", "tests/engine/test_zoo.py", "tests/pure/a.py", "tests/pure/b.py"]
    layers, process = Layers.__new__(Layers), Process(number)
    layers.workqueue = OrderedDict((file, {file: False}) for file in files)
    layers.assigned_work = OrderedDict()
    layers.registered_collections = {process: files}  # type: ignore[dict-item]
    while layers.workqueue:
        layers._assign_work_unit(process)
    assert process.took == takes


@pytest.mark.parametrize("name", sorted(OWN_ENGINE))
def test_files_with_an_engine_of_their_own_leave_the_shared_one_alone(name: str) -> None:
    """Else a second process would start it again."""
    functions = [
        node
        for node in ast.walk(ast.parse((FOLDER / name).read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    local = {function.name for function in functions}
    wanted = {
        argument.arg
        for function in functions
        if function.name.startswith("test_") or function.decorator_list
        for argument in function.args.args
    }
    assert not wanted & SHARED - local

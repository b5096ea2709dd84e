"""What is private, patched or guessed of vLLM is where it was; see ``server/engine/contract.py``."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from server.app import create_app
from server.engine import contract, source_names
from server.engine.contract import PINS, USES, ContractBroken, check
from server.engine.source_names import Sources, Use, missing_of
from tests.support import tiny
from tests.support.calls import calls_of

ROOT = Path(__file__).parents[3]


def tree(tmp_path: Path, **files: str) -> dict[str, Path]:
    """A package ``pack`` with these modules, for ``check``."""
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    return {"pack": tmp_path}


def missing(monkeypatch: pytest.MonkeyPatch, roots: dict[str, Path], *uses: Use) -> list[str]:
    """The lines of the error for these uses; none where ``check`` is content."""
    monkeypatch.setattr(contract, "USES", uses)
    try:
        check(roots)
    except ContractBroken as error:
        return [line.strip() for line in str(error).splitlines() if line.startswith("  ")]
    return []


def test_the_installed_packages_have_what_is_used_of_them() -> None:
    check()


def test_a_check_takes_far_less_than_a_start() -> None:
    contract._missing_of_installed.cache_clear()
    assert calls_of(check) < 6_000_000, "which take two seconds, and a start 13 and more"
    assert calls_of(check) < 100, "nothing is read twice in a process"


def test_a_gateway_is_checked_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "find_spec", lambda name: None if name == "vllm" else find_spec(name))
    monkeypatch.setattr(contract, "_missing_of_installed", contract._missing_of_installed.__wrapped__)
    check(packages=contract.WITHOUT_ENGINE)
    with pytest.raises(ContractBroken, match="the package vllm is not installed"):
        check()


async def test_a_gateway_does_not_start_on_what_it_cannot_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = Use("uvicorn.server", "Server", ("run_until_drained",), "drains before it stops")
    monkeypatch.setattr(contract, "USES", [*contract.WEB_USES, changed])
    monkeypatch.setattr(contract, "_missing_of_installed", contract._missing_of_installed.__wrapped__)
    app = create_app(tiny.settings(tmp_path, role="gateway", fleet_key="a fleet's key of the tests"))
    with pytest.raises(ContractBroken, match="run_until_drained: not there"):
        async with app.router.lifespan_context(app):
            pass


@pytest.mark.parametrize(
    ("here", "module", "there"),
    [
        ("BoundedHeads", "uvicorn.protocols.http.httptools_impl", "HttpToolsProtocol"),
        ("DrainingServer", "uvicorn.server", "Server"),
        ("cycle", "uvicorn.protocols.http.httptools_impl", "RequestResponseCycle"),
        ("flow", "uvicorn.protocols.http.flow_control", "FlowControl"),
    ],
)
def test_every_name_that_connections_take_from_uvicorn_is_on_the_list(
    here: str, module: str, there: str
) -> None:
    """``here``: a class of connection.py, or what it calls an object of the class ``there``."""
    tree = ast.parse((ROOT / "server" / "http" / "connection.py").read_text())
    found = next((one for one in tree.body if isinstance(one, ast.ClassDef) and one.name == here), None)
    taken = names_at(found, "self", "super()") if found is not None else names_at(tree, here, f"self.{here}")
    if found is not None:
        taken |= {one.name for one in found.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)}
    uvicorn = contract._installed(["uvicorn"])
    sources = Sources(uvicorn)
    theirs = {
        name
        for name in taken
        if not name.startswith("__") and not list(missing_of(sources, Use(module, there, (name,), "w")))
    }
    listed = {
        member.partition("(")[0]
        for use in USES
        if (use.module, use.name) == (module, there)
        for member in use.members
    }
    assert theirs, "nothing was found, which says nothing"
    assert theirs - listed == set()


def names_at(tree: ast.AST, *owners: str) -> set[str]:
    """The attributes that are taken of ``owners`` in ``tree``."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {node.attr for node in nodes if ast.unparse(node.value) in owners}


def test_the_check_imports_nothing_of_what_it_looks_at() -> None:
    script = (
        "import sys; from server.engine.contract import check; check();"
        "print([name for name in ('vllm', 'torch', 'uvicorn', 'sqlalchemy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_pins_are_those_that_are_installed_from_the_requirements() -> None:
    text = (ROOT / "config" / "requirements-cpu.txt").read_text()
    pinned = dict(re.findall(r"^([a-z-]+)==(\S+)$", text, re.MULTILINE))
    names = {name: name.replace("_", "-") for name in PINS}
    assert {n: pinned.get(shown) or pinned[f"{shown}-cpu"] for n, shown in names.items()} == PINS


def test_every_use_says_why() -> None:
    assert [use for use in USES if not use.why or not (use.name or use.text)] == []


@pytest.mark.skipif("LORAPLEX_TEST_VLLM" not in os.environ, reason="no other vLLM is unpacked")
def test_another_vllm_has_what_is_used_of_it() -> None:
    """``LORAPLEX_TEST_VLLM``: the folder ``vllm`` of an unpacked wheel."""
    roots = contract._installed()
    check(roots | {"vllm": Path(os.environ["LORAPLEX_TEST_VLLM"])})


class Parsed:
    """Modules as ``Sources`` has them; those of the same name and text are parsed once."""

    def __init__(self) -> None:
        self._modules: dict[tuple[str, str, str], Any] = {}
        self._parse = source_names._Module

    def __call__(self, name: str, path: Path) -> Any:
        key = (name, path.name, path.read_text(encoding="utf-8"))
        if key not in self._modules:
            self._modules[key] = self._parse(name, path)
        return self._modules[key]


@pytest.fixture(scope="module")
def parsed() -> Parsed:
    return Parsed()


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        ("v1/engine/async_llm.py", "def _add_request(", "def _enter(", "AsyncLLM._add_request"),
        ("v1/engine/output_processor.py", "lora_states", "lora_table", "OutputProcessor.lora_states"),
        ("lora/lora_model.py", "safetensors.safe_open(", "safe_open(", "no longer contains"),
        ("lora/request.py", "lora_path", "lora_folder", "LoRARequest.lora_path"),
        ("lora/worker_manager.py", "_load_adapter", "_read_adapter", "_load_adapter"),
    ],
)
def test_a_vllm_that_has_changed_is_refused_by_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parsed: Parsed,
    file: str,
    old: str,
    new: str,
    named: str,
) -> None:
    monkeypatch.setattr(source_names, "_Module", parsed)
    installed = contract._installed()
    copy = tmp_path / "vllm"
    for path in {
        found
        for use in USES
        if (found := Sources(installed).path(use.module)) is not None
        and found.is_relative_to(installed["vllm"])
    }:
        target = copy / path.relative_to(installed["vllm"])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    changed = copy / file
    changed.write_text(changed.read_text().replace(old, new))
    with pytest.raises(ContractBroken, match=re.escape(named)) as caught:
        check(installed | {"vllm": copy})
    assert "tested with 0.32.0" in str(caught.value)


def test_members_are_found_in_bases_and_in_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = tree(
        tmp_path,
        base="class Base:\n    def run(self, a, *, b=1): ...\n    kind: str\n",
        thing="""
            from pack.base import Base as Old
            if True:
                class Thing(Old):
                    def __init__(self):
                        self.table, self.other = {}, 1
                        self.late: int = 3
        """,
    )
    good = Use("pack.thing", "Thing", ("run(a, b)", "kind", "table", "other", "late", "gone|late"), "w")
    assert missing(monkeypatch, roots, good) == []
    bad = Use("pack.thing", "Thing", ("run(c)", "gone", "kind(x)"), "w")
    assert missing(monkeypatch, roots, bad) == [
        "pack.thing.Thing.run: takes no c any more (w)",
        "pack.thing.Thing.gone: not there (w)",
        "pack.thing.Thing.kind: no function any more (w)",
    ]


def test_modules_move_and_names_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = tree(tmp_path, new="def make(a): ...\n", front="from .new import make\n")
    assert missing(monkeypatch, roots, Use("pack.old", "make(a)", or_module="pack.new", why="w")) == []
    assert missing(monkeypatch, roots, Use("pack.front", "make(a)", why="w")) == []
    assert missing(monkeypatch, roots, Use("pack.old", "make", why="w")) == ["pack.old: no such module (w)"]
    assert missing(monkeypatch, roots, Use("pack.front", "other", why="w")) == [
        "pack.front.other: not there (w)"
    ]

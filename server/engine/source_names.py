"""What a package's source files have, by name: found by reading them, without an import."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Use:
    """Something in ``module``: a class, function or variable ``name`` that has ``members``.

    Members are methods and attributes, inherited ones too. A member written ``method(a, b)`` must accept
    these parameters; of ``one|other`` either will do. ``text``: pieces of code that the module must contain,
    where only the way something is called matters. ``or_module`` is where another supported version keeps it.
    """

    module: str
    name: str = ""
    members: tuple[str, ...] = ()
    why: str = ""
    text: tuple[str, ...] = ()
    or_module: str = ""


class Sources:
    """Parsed modules of packages, read when they are first needed."""

    def __init__(self, roots: Mapping[str, Path]) -> None:
        self._roots = roots
        self.module = functools.cache(self._module)

    def path(self, module: str) -> Path | None:
        """The file of ``module``; None where there is none, or the package is not one of ``roots``."""
        package, *parts = module.split(".")
        if package not in self._roots:
            return None
        folder = self._roots[package].joinpath(*parts)
        candidates = (folder.with_suffix(".py"), folder / "__init__.py")
        return next((path for path in candidates if path.is_file()), None)

    def _module(self, module: str) -> _Module | None:
        path = self.path(module)
        return None if path is None else _Module(module, path)


class _Module:
    """The names at the top of a file, within ``if`` and ``try`` too."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.text = path.read_text(encoding="utf-8")
        self.defined: dict[str, ast.stmt] = {}
        self.imported: dict[str, tuple[str, str]] = {}
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in _statements(ast.parse(self.text).body):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                self.defined[node.name] = node
            elif isinstance(node, ast.ImportFrom):
                source = _absolute(package, node.level, node.module or "")
                self.imported |= {(one.asname or one.name): (source, one.name) for one in node.names}
            elif isinstance(node, ast.Import):
                self.imported |= {(one.asname or one.name): (one.name, "") for one in node.names}
            else:
                self.defined |= dict.fromkeys(_assigned(node), node)


def _absolute(package: str, level: int, module: str) -> str:
    if not level:
        return module
    base = package.split(".")[: len(package.split(".")) - level + 1]
    return ".".join([*base, *([module] if module else [])])


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, ()))
            for handler in getattr(node, "handlers", ()):
                yield from _statements(handler.body)
        else:
            yield node


def _assigned(node: ast.stmt) -> Iterator[str]:
    """The names or ``self``'s attributes that a statement assigns to."""
    targets: Sequence[ast.expr] = ()
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    for target in targets:
        for one in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(one, ast.Name):
                yield one.id
            elif (
                isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name) and one.value.id == "self"
            ):
                yield one.attr


def missing_of(sources: Sources, use: Use) -> Iterator[str]:
    """What ``use`` names and ``sources`` do not have, each as a line for a reader."""
    module = sources.module(use.module) or (sources.module(use.or_module) if use.or_module else None)
    if module is None:
        yield f"{use.module}: no such module ({use.why})"
        return
    for text in use.text:
        if text not in module.text:
            yield f"{module.name}: no longer contains {text!r} ({use.why})"
    if not use.name:
        return
    name, _, parameters = use.name.partition("(")
    found = _resolve(sources, module, name)
    if found is None:
        yield f"{module.name}.{name}: not there ({use.why})"
        return
    owner, node = found
    if parameters:
        yield from _refused(f"{owner.name}.{name}", node, parameters, use.why)
    if use.members:
        members = _members(sources, owner, node)
        for member in use.members:
            attribute, _, parameters = member.partition("(")
            label = f"{module.name}.{name}.{attribute}"
            if not any(one in members for one in attribute.split("|")):
                yield f"{label}: not there ({use.why})"
            elif parameters:
                yield from _refused(label, members[attribute], parameters, use.why)


def _resolve(sources: Sources, module: _Module, name: str) -> tuple[_Module, ast.AST] | None:
    """The module that defines ``name``, which ``module`` may only import, and its definition."""
    for _ in range(8):
        if name in module.defined:
            return module, module.defined[name]
        if name not in module.imported:
            return None
        source, name = module.imported[name]
        following = sources.module(source)
        if following is None:
            return None
        module = following
    return None


def _members(sources: Sources, module: _Module, node: ast.AST) -> dict[str, ast.AST]:
    """The attributes of the class ``node``: its own, its bases', and what any method assigns to self."""
    if not isinstance(node, ast.ClassDef):
        return {}
    members: dict[str, ast.AST] = {}
    for base in node.bases:
        if isinstance(base, ast.Subscript):
            base = base.value
        name = base.id if isinstance(base, ast.Name) else base.attr if isinstance(base, ast.Attribute) else ""
        if (found := _resolve(sources, module, name)) is not None:
            members |= _members(sources, *found)
    for statement in _statements(node.body):
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            members[statement.name] = statement
            for inner in ast.walk(statement):
                if isinstance(inner, ast.Assign | ast.AnnAssign):
                    members |= {name: inner for name in _assigned(inner) if name not in members}
        else:
            members |= dict.fromkeys(_assigned(statement), statement)
    return members


def _refused(label: str, node: ast.AST, parameters: str, why: str) -> Iterator[str]:
    """The parameters, as in "a, b)", that the function ``node`` does not have."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield f"{label}: no function any more ({why})"
        return
    has = {one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
    wanted = [name for name in parameters.removesuffix(")").split(", ") if name]
    if lost := [name for name in wanted if name not in has]:
        yield f"{label}: takes no {', '.join(lost)} any more ({why})"

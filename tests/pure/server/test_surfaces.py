"""A new API surface is one new file: what differs between surfaces is decided by each, and nowhere listed."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.inference import dialects
from server.inference.dialects.base import Dialect
from server.inference.dialects.registry import COUNTING, SCORING, SURFACES, found_in

SERVER = Path(dialects.__file__).parents[2]
# They ask a server as a client does.
CLIENTS = ("cli", "demo")
KNOWN = {one.name for one in SURFACES} | {one.path for one in SURFACES}
ECHO = '''
from server.inference.dialects.base import Dialect
from server.inference.dialects.completions import Completions

class Echo(Completions):
    name = "echo"
    path = "/v1/echo"

class Helper(Dialect):
    """Of others; it has no path."""
'''


def test_a_file_beside_the_others_is_a_surface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "echo.py").write_text(ECHO)
    monkeypatch.setattr(dialects, "__path__", [*dialects.__path__, str(tmp_path)])
    try:
        found = list(found_in(dialects.__path__))
    finally:
        sys.modules.pop(f"{dialects.__name__}.echo", None)
        monkeypatch.delattr(dialects, "echo", raising=False)
    assert {one.name for one in found} == {one.name for one in SURFACES} | {"echo"}
    assert len({one.path for one in found}) == len(found)


def test_each_surface_says_what_others_need_to_know() -> None:
    for one in SURFACES:
        assert one.path.startswith("/")
        assert one.example.items() >= {"model": "support"}.items()
        assert {"model", *one.example} <= one.accepted
        assert set(one.replayed_fields) <= one.accepted
        assert one in SCORING or set(one.prompt_fields) <= one.accepted
        assert one in COUNTING or one in SCORING or one.prompt_field is not None
    assert len({one.place for one in SURFACES}) == len(SURFACES)
    bases = [one.base for one in SURFACES if one.first_request is not None]
    assert sorted(bases) == ["embeddings", "labels", "text"], "what each kind of base is asked first"


def test_traces_call_a_surface_what_it_is() -> None:
    told = {one.name: one.span or one.operation for one in SURFACES if one not in COUNTING}
    chats = dict.fromkeys(("chat", "messages", "responses"), "chat")  # as OpenTelemetry's conventions do
    others = {"completion": "text_completion", "embedding": "embeddings", "classification": "classify"}
    assert told == chats | others | {"rerank": "rerank", "score": "score"}


@pytest.mark.parametrize("surface", SURFACES, ids=lambda one: one.name)
def test_a_system_prompt_never_takes_the_place_of_a_requests_own(surface: Dialect) -> None:
    body = {**surface.example}
    surface.add_system(body, "be brief")
    once = dict(body)
    surface.add_system(body, "be long")
    assert body == once
    assert surface.allowed_fields(once)


def lists_of_surfaces(tree: ast.AST) -> Iterator[ast.expr]:
    """Collections with two names or paths of surfaces, and comparisons with the name of one."""
    for node in ast.walk(tree):
        inner: list[ast.expr | None] = []
        if isinstance(node, ast.Dict):
            inner = [*node.keys] if len(node.keys) > 1 else []
            values = [one.value for one in node.values if isinstance(one, ast.Constant)]
            if len(KNOWN & {one for one in values if isinstance(one, str)}) > 1:
                yield node
        elif isinstance(node, ast.Set | ast.List | ast.Tuple):
            inner = [*node.elts]
        elif isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute):
            told = {one.value for one in node.comparators if isinstance(one, ast.Constant)}
            if node.left.attr in ("name", "kind", "dialect", "endpoint") and told & KNOWN:
                yield node
        texts = {one.value for one in inner if isinstance(one, ast.Constant) and isinstance(one.value, str)}
        if isinstance(node, ast.expr) and len(KNOWN & texts) > 1:
            yield node


def test_no_other_file_lists_surfaces() -> None:
    found = [
        f"{path.relative_to(SERVER)}:{node.lineno}: {ast.unparse(node)[:100]}"
        for path in sorted(SERVER.rglob("*.py"))
        if path.parent != Path(dialects.__file__).parent and path.relative_to(SERVER).parts[0] not in CLIENTS
        for node in lists_of_surfaces(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "SPANS = {'/v1/messages': 'chat', '/v1/responses': 'chat'}",
        "KINDS = {'text': 'completion', 'labels': 'classification'}",
        "IN_PARTS = frozenset({'classification', 'embedding'})",
        "if dialect.name == 'chat': pass",
    ],
)
def test_such_a_list_would_be_found(code: str) -> None:
    assert list(lists_of_surfaces(ast.parse(code)))

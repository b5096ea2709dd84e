"""Commands whose server is of another release, or is no Loraplex, and values that cannot be sent."""

from __future__ import annotations

import functools
import shlex
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import Result

from server.__main__ import cli
from server.cli import client as remote
from server.cli.client import Answer
from server.cli.examples import CUSTOMERS, EXAMPLES, LOOKING, PANELS
from tests.support.commands import Commands

# They look again and again, or need files or a customer's own key.
LEFT_OUT = ("bench", "chat", "adapters push", "adapters download")
LINES = [
    line
    for words, lines in EXAMPLES.items()
    if PANELS.get(words.split()[0]) in (CUSTOMERS, LOOKING) and words not in LEFT_OUT
    for line in lines
]
ANSWERS: dict[str, dict[str, Any]] = {
    "nothing": {"content": b"", "headers": {"content-type": "application/json"}},
    "no content": {"status_code": 204},
    "an empty object": {"json": {}},
    "a list": {"json": [1, 2]},
    "null": {"json": None},
    "a number": {"json": 5},
    "no JSON": {"content": b"{", "headers": {"content-type": "application/json"}},
    "empty rows": {"json": {"object": "list", "data": [{}], "next": None}},
    "rows of an older release": {"json": {"object": "list", "data": [{"id": "acme", "name": "a"}]}},
    "a vLLM": {"json": {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm"}]}},
}


def answering(monkeypatch: pytest.MonkeyPatch, **answer: Any) -> None:
    def handle(_: httpx.Request) -> httpx.Response:
        return httpx.Response(**{"status_code": 200} | answer)

    made = functools.partial(remote.AdminClient, transport=httpx.MockTransport(handle))
    monkeypatch.setattr("server.cli.command.AdminClient", made)


def run(*words: str) -> Result:
    environment = {"LORAPLEX_URL": "http://127.0.0.1:1", "LORAPLEX_ADMIN_KEY": "k" * 20}
    more = ["--count", "1"] if words[0] == "top" else []
    return Commands().invoke(cli, [*words, *more], env=environment, input="y\n")


@pytest.mark.parametrize("kind", ANSWERS)
def test_no_answer_ends_a_command_with_a_traceback(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    answering(monkeypatch, **ANSWERS[kind])
    refused = 0
    for line in LINES:
        done = run(*shlex.split(line, comments=True)[1:])
        assert done.exception is None or isinstance(done.exception, SystemExit), line
        assert done.exit_code in (0, 1), (line, done.output)
        refused += done.exit_code
    assert refused > 20, "most of them cannot go on"


def test_a_field_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, json={"object": "list"})
    said = run("tenants", "list")
    assert said.exit_code == 1
    assert said.output.startswith("answer_incomplete: The answer has no `data`, which this release (")


def test_an_answer_is_a_dictionary_but_for_that() -> None:
    answer = Answer(a=1)
    assert (answer["a"], answer.get("b"), "b" in answer) == (1, None, False)
    with pytest.raises(remote.RemoteError, match="no `b`"):
        answer["b"]


@pytest.mark.parametrize(
    "words",
    [
        ("tenants", "set", "acme", "--weight", "nan"),
        ("tenants", "set", "acme", "--limits", '{"tokens_per_minute": Infinity}'),
        ("adapters", "defaults", "acme", "a", '{"temperature": NaN}'),
        ("adapters", "note", "acme", "a", "1", "\udcff"),
    ],
)
def test_what_cannot_be_sent_is_said(monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    answering(monkeypatch, json={})
    said = run(*words)
    assert (said.exit_code, said.output[:14]) == (1, "value_invalid:"), said.output


@pytest.mark.parametrize(
    "words", [("backup", ""), ("backup", " "), ("restore", ""), ("check", "--backup", "")]
)
def test_a_folder_without_a_name_is_not_the_one_that_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """``loraplex backup "$DIR"`` with a variable that is unset."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAPLEX_MODEL", "/m")
    said = run(*words)
    assert (said.exit_code, "it is empty" in said.output) == (2, True), said.output
    assert not list(tmp_path.iterdir())

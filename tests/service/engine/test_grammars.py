"""Schemas, patterns and grammars that nobody may be hurt by, in the real compiling process."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xgrammar

from server.engine import grammar_process
from server.engine.grammars import MOST_WAITING, Grammars, Spec
from server.engine.passed_over import is_passed_over
from server.engine.structure import MOST_CHARACTERS, settle, specs_of
from server.errors import BadRequest, ServerError, TooManyRequests, Unavailable
from server.inference.dialects.arguments import held_arguments
from server.inference.dialects.registry import DIALECTS
from tests.support.calls import counted

pytestmark = pytest.mark.asyncio(loop_scope="module")

LETTERS = [chr(code) for code in range(32, 127)]
SLOW = Spec("regex", "((c|d|.){1,491}){1,500}")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "emails": {"type": "array", "items": {"type": "string", "format": "email"}},
        "parent": {"$ref": "#"},
    },
    "required": ["name"],
}


def schema(value: Any) -> Spec:
    return Spec("json", json.dumps(value))


@pytest.fixture(scope="module")
def tokenizer() -> str:
    info = xgrammar.TokenizerInfo([*LETTERS, "</s>"], stop_token_ids=[len(LETTERS)])
    return str(info.serialize_json())


@pytest.fixture(scope="module")
def grammars(tokenizer: str) -> Iterator[Grammars]:
    made = Grammars(tokenizer, seconds=60, any_whitespace=True, places=4)
    yield made
    made.stop()


@pytest.fixture
def strict(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> Grammars:
    """With less time of the processor than what is slow takes; of the clock as much as it wants."""
    monkeypatch.setattr(grammars, "_seconds", 0.5)
    monkeypatch.setattr("server.engine.grammars.BY_THE_CLOCK", 1000)
    monkeypatch.setattr("server.engine.grammars.REFUSED_FOR_S", 3600.0)
    return grammars


async def refusal(grammars: Grammars, *specs: Spec, owner: str = "a") -> ServerError:
    with pytest.raises(ServerError) as caught:
        await grammars.check(owner, specs)
    return caught.value


def children(grammars: Grammars) -> list[int]:
    process = grammars._process
    assert process is not None
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


async def until(grammars: Grammars, compiling: int) -> None:
    """Waits until so many children compile."""
    async with asyncio.timeout(120):
        while len(children(grammars)) != compiling:
            await asyncio.sleep(0.02)


USABLE = [
    schema(PERSON),
    schema({"enum": [f"value {n}" for n in range(2000)]}),
    schema({"type": "object", "patternProperties": {"^[a-z]+$": {"type": "string"}}}),
    schema({"anyOf": [{"anyOf": [{"type": "string"}, {"type": "null"}]}, {"type": "integer"}]}),
    Spec("regex", r"[a-z0-9.]+@[a-z]{1,20}\.com"),
    Spec("grammar", 'root ::= expr\nexpr ::= term ("+" term)*\nterm ::= [0-9]+ | "(" expr ")"'),
    Spec("lark", 'start: "a" b\nb: /[0-9]+/'),
    Spec(
        "structural_tag",
        json.dumps({"type": "structural_tag", "format": {"type": "json_schema", "json_schema": PERSON}}),
    ),
]


async def test_what_people_send_is_usable(grammars: Grammars) -> None:
    for spec in USABLE:
        await grammars.check("a", [spec])


CALL = ('<tool_call>{"name": "f", "arguments": ', "}</tool_call>")


@pytest.mark.parametrize(
    ("blanks", "written"),
    [
        (" ", '{"name": "a  b"}'),
        (" ", '{ "name": "a" }'),
        ("\n", '{"name":\n"a"}'),
        ("\n  ", '{"name":\n  "a"}'),
    ],
)
async def test_between_the_parts_of_a_call_is_one_blank_at_a_time(blanks: str, written: str) -> None:
    """Blanks within a text are the text's own."""
    from vllm.sampling_params import StructuredOutputsParams
    from xgrammar.testing import _is_grammar_accept_string as accepts

    content = {"type": "json_schema", "json_schema": PERSON, "max_whitespace_cnt": None}
    tag = {"type": "tag", "begin": CALL[0], "content": content, "end": CALL[1]}
    several = {"type": "tags_with_separator", "tags": [tag], "separator": "", "at_least_one": True}
    for any_whitespace in (True, False):
        params = StructuredOutputsParams(
            structural_tag=json.dumps({"type": "structural_tag", "format": several})
        )
        spec = settle(params, any_whitespace=any_whitespace)
        assert spec is not None
        assert spec.text == params.structural_tag
        allowed = accepts(xgrammar.Grammar.from_structural_tag(spec.text), written.join(CALL))
        assert allowed is (any_whitespace or len(blanks) == 1)


PART = {"properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    "schema_of_a_tool",
    [
        PART | {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"type": "object", "anyOf": [{"required": ["a"]}, PART]},
        {"type": "object", "allOf": [PART, {"minProperties": 1}]},
        {"anyOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": {"enum": ["x", {"a": 1}]}}},
        {"$ref": "#/$defs/x", "$defs": {"x": {"oneOf": [True, {"type": "null"}]}}},
        {"type": "object", "enum": ["x", {"a": 1}]},
        {"type": "object", "minProperties": 1},
    ],
)
async def test_what_a_call_is_held_to_lets_it_be_nothing_but_an_object(
    schema_of_a_tool: dict[str, Any],
) -> None:
    from xgrammar.testing import _is_grammar_accept_string as accepts

    grammar = xgrammar.Grammar.from_json_schema(json.dumps(held_arguments(schema_of_a_tool)))
    assert accepts(grammar, '{"a":1}')
    assert not any(accepts(grammar, text) for text in ('"x"', "1", "[]", "null", "true", '[{"a":1}]'))


LATE = [
    SLOW,
    Spec("regex", "(((a|bc|.){1,300}){1,300}){1,30}"),
    schema({"type": "string", "pattern": f"^{SLOW.text}$"}),
    Spec("lark", "start: /((c|d|.){1,491}){1,500}/"),
]


async def test_what_takes_too_long_is_refused_and_leaves_nothing_behind(strict: Grammars) -> None:
    for spec in LATE:  # each takes minutes
        error = await refusal(strict, spec)
        assert (type(error), error.code) == (BadRequest, "schema_too_complex"), (spec, error.message)
    await until(strict, 0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(strict, "_joined", None)  # it is remembered
        await refusal(strict, SLOW)


async def test_a_machine_without_time_says_nothing_of_a_schema(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks is told to come again, and what was asked for is not remembered as too complex."""
    await grammars.check("e", [schema({})])
    with monkeypatch.context() as patched:
        patched.setattr("server.engine.grammars.BY_THE_CLOCK", 0.001)
        error = await refusal(grammars, Spec("regex", "((i|j|.){1,491}){1,500}"), owner="e")
        assert isinstance(error, Unavailable)
        assert error.retry_after
    await until(grammars, 0)
    await grammars.check("e", [Spec("regex", "i|j")])


@pytest.mark.parametrize("grammar", ['root ::= s\ns ::= s s s | s s | "a"', 'root ::= s\ns ::= s s | "a"'])
async def test_what_is_compiled_at_once_and_makes_every_token_slow_is_refused(
    grammars: Grammars, grammar: str
) -> None:
    assert (await refusal(grammars, Spec("grammar", grammar))).code == "schema_too_complex"


WRONG = [
    schema({"$ref": "#"}),
    schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
    schema({"$ref": "#/$defs/missing"}),
    schema({"type": "string", "pattern": r"^\p{L}+$"}),
    schema({"type": "string", "pattern": r"(a)\1"}),
    schema({"type": "string", "pattern": "(("}),
    schema({"type": "spell"}),
    Spec("regex", "(" * 20_000 + "a" + ")" * 20_000),
    Spec("grammar", "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000),
    Spec("grammar", "root ::= a\na ::= a"),
    Spec("grammar", "root ::= (("),
    Spec("lark", "start: ("),
    Spec("structural_tag", "{}"),
    Spec("structural_tag", "no json"),
]


async def test_what_is_wrong_is_refused_with_the_reason(grammars: Grammars) -> None:
    for spec in WRONG:
        error = await refusal(grammars, spec)
        assert (type(error), error.code) == (BadRequest, "invalid_request"), (spec, error.message)
        assert "/project/" not in error.message
        assert len(error.message) < 500


async def test_memory_is_bounded(tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.grammars.LARGEST_BYTES", 1000)
    grammars = Grammars(tokenizer, seconds=60, any_whitespace=True)
    try:
        error = await refusal(grammars, schema(PERSON))
        assert (error.code, "too large" in error.message) == ("schema_too_complex", True)
        monkeypatch.setattr("server.engine.grammars.MEMORY_BYTES", 1 << 20)
        words = schema({"enum": [f"a value of some length, number {n}" for n in range(20_000)]})
        assert (await refusal(grammars, words)).code == "schema_too_complex"
    finally:
        grammars.stop()


async def test_one_compiles_for_all_that_ask_and_ends_with_the_last_of_them(grammars: Grammars) -> None:
    await grammars.check("a", [schema({})])
    slow = [Spec("regex", "((e|.){1,491}){1,500}")]
    first, second = (asyncio.create_task(grammars.check("a", slow)) for _ in range(2))
    await until(grammars, 1)
    first.cancel()
    await asyncio.sleep(0.1)
    assert len(children(grammars)) == 1
    second.cancel()
    await until(grammars, 0)
    assert not grammars._under_way
    assert not grammars._waiting


async def test_one_owner_takes_half_of_the_places_and_keeps_nobody_waiting(grammars: Grammars) -> None:
    """An owner of its own: of ``a`` these are remembered as too dear, and end at once."""
    await grammars.check("b", [schema({})])
    slow = [
        asyncio.create_task(grammars.check("greedy", [Spec("regex", f"((c|d|.){{1,49{n}}}){{1,500}}")]))
        for n in range(6)
    ]
    await until(grammars, 2)
    await grammars.check("b", [schema(PERSON)])
    assert not any(task.done() for task in slow)
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)


async def test_too_many_of_one_owner_are_told_to_come_again(grammars: Grammars) -> None:
    slow = [
        asyncio.create_task(grammars.check("a", [Spec("regex", f"((c|.){{1,{400 + n}}}){{1,500}}")]))
        for n in range(MOST_WAITING)
    ]
    await asyncio.sleep(0)
    error = await refusal(grammars, schema({"const": "one more"}))
    assert isinstance(error, TooManyRequests)
    assert error.retry_after
    await grammars.check("b", [schema({})])
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)


async def test_an_answer_does_not_wait_for_what_was_begun_after_it(grammars: Grammars) -> None:
    await grammars.check("d", [schema({})])
    quick = asyncio.create_task(grammars.check("d", [schema(PERSON)]))
    await asyncio.sleep(0)
    slow = asyncio.create_task(
        grammars.check("d", [Spec("regex", "((f|.){1,491}){1,900}|((g|h|.){1,499}){1,900}")])
    )
    await quick
    assert not slow.done()
    slow.cancel()
    await asyncio.gather(slow, return_exceptions=True)


async def test_nobody_waits_long_for_a_place(strict: Grammars) -> None:
    slow = [Spec("regex", f"((c|e|.){{1,49{n}}}){{1,500}}") for n in range(8)]
    answers = await asyncio.gather(*(strict.check("c", [one]) for one in slow), return_exceptions=True)
    assert {type(answer) for answer in answers} == {BadRequest, TooManyRequests}


async def test_a_compiling_process_that_was_killed_is_started_again(grammars: Grammars) -> None:
    await grammars.check("a", [schema({})])
    assert grammars._process is not None
    os.kill(grammars._process.pid, 9)
    grammars._process.wait()
    await grammars.check("a", [schema({"type": "integer"})])


async def test_it_ends_with_its_parent(grammars: Grammars) -> None:
    await grammars.check("a", [schema({})])
    process, control = grammars._process, grammars._control
    assert process is not None
    assert control is not None
    control.close()
    async with asyncio.timeout(60):
        while process.poll() is None:
            await asyncio.sleep(0.02)


async def test_a_child_that_is_done_at_once_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    done = await asyncio.create_subprocess_exec("true")
    await done.wait()
    monkeypatch.setattr(os, "fork", lambda: done.pid)
    (ours, control), (asker, job) = socket.socketpair(), socket.socketpair()
    with ours, control, asker:
        with job:
            socket.send_fds(ours, [b"j"], [job.fileno()])
        assert grammar_process._start(control, None, {}) is None
        assert asker.recv(1) == b"", "its asker sees the end of the answer"


def asked(**constraint: Any) -> Any:
    """A completion's request, as vLLM reads it."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    return CompletionRequest(model="a", prompt="x", structured_outputs=constraint)


OBJECTS = [{"a": [number]} for number in range(60_000)]
LARGE: dict[str, dict[str, Any]] = {
    "choices": {"choice": ["x" * 3900] * 1024},
    "a grammar's lines": {"grammar": "\n".join(f"a{number}: b" for number in range(300_000))},
    "a pattern": {"regex": "a|" * (MOST_CHARACTERS // 2) + "a"},
    "a schema as text": {"json": json.dumps({"enum": OBJECTS})},
    "a schema of numbers": {"json": {"enum": list(range(250_000))}},
    "a constant": {"json": {"const": "y" * (MOST_CHARACTERS + 1)}},
    "a structural tag": {"structural_tag": json.dumps({"type": "structural_tag", "structures": OBJECTS})},
}


@pytest.mark.parametrize("what", LARGE)
async def test_what_is_large_costs_the_event_loop_little(what: str) -> None:
    """It took up to 1.2 seconds before it went to the compiling process, which refused it."""
    specs_of(asked(regex="a"))  # imports

    def read() -> None:
        fields = DIALECTS["completion"].allowed_fields({"prompt": "x", "structured_outputs": LARGE[what]})
        specs_of(asked(**fields["structured_outputs"]))

    with pytest.raises(BadRequest, match=str(MOST_CHARACTERS)) as caught, counted() as calls:
        read()
    assert caught.value.code == "schema_too_complex"
    assert calls.count < 20_000, "hardly any of what is large is looked at by itself"


async def test_choices_that_no_surface_has_looked_at() -> None:
    with pytest.raises(BadRequest, match=str(MOST_CHARACTERS)):
        settle(asked(choice=["x" * 3900] * 1024).structured_outputs, any_whitespace=True)


PASSED_OVER: list[dict[str, Any]] = [
    {"not": {"type": "string"}},
    {"if": {"type": "string"}, "then": {"maxLength": 1}},
    {"$ref": "https://example.org/schema.json"},
    {"$ref": "other.json#/$defs/a"},
    {"type": "object", "properties": {"a": {"items": {"not": {}}}}},
    {"anyOf": [{"type": "null"}, {"dependentRequired": {"a": ["b"]}}]},
    {"$defs": {"a": {"$dynamicRef": "#b"}}, "$ref": "#/$defs/a"},
    {"type": "string", "pattern": "^(?!a)[ab]$"},
    {"type": "string", "pattern": "^([[(]|(?=b))b$"},
    {"type": "object", "patternProperties": {"^(?!a)": {"type": "string"}}},
    {"type": "string", "pattern": "^a$b"},
    {"type": "object", "properties": {"a": {"type": "string"}}, "anyOf": [{"required": ["a"]}]},
    {"$ref": "#/$defs/a", "minimum": 5, "$defs": {"a": {"type": "integer"}}},
    {"type": "integer", "anyOf": [{"minimum": 3, "type": "integer"}, {"maximum": 1}]},
    {"type": "string", "oneOf": [{"pattern": "^a$"}, {"pattern": "^b$"}]},
    {"anyOf": [{"type": "integer"}], "minimum": 2},
    {"type": "string", "const": 1},
    {"type": "integer", "enum": [1, "a"]},
    {"type": "string", "enum": ["a"], "minLength": 3},
    {"minimum": 3},
    {"pattern": "^a$"},
    {"required": ["a"]},
    {"type": "object", "required": ["a", "b"], "properties": {"a": {}}},
]


@pytest.mark.parametrize("given", PASSED_OVER)
async def test_what_the_compiler_passes_over_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="not enforced"):
        specs_of(asked(json=given))


@pytest.mark.parametrize(
    "given",
    [
        {"type": [{}], "const": 1},
        {"type": {"a": 1}, "anyOf": [{"type": "string"}]},
        {"type": "integer", "enum": [1e999, 10**400]},
        {"type": "string", "anyOf": [{"type": [{}]}]},
        {"type": "object", "required": [{}], "properties": {}},
        {"type": "string", "pattern": "[" * (MOST_CHARACTERS - 100)},
        {"type": "string", "pattern": "[" * 60_000 + "\\"},
    ],
)
async def test_what_is_no_schema_is_looked_at_in_one_pass(given: dict[str, Any]) -> None:
    """A pattern of brackets that none closes took minutes, and a type of another kind was a defect."""
    assert isinstance(is_passed_over(given), bool)


@pytest.mark.parametrize(
    "given",
    [
        {"type": "object", "properties": {"not": {"type": "string"}, "if": {"const": {"not": 1}}}},
        {"enum": [{"$ref": "x"}, {"not": 1}], "$defs": {"not": {"type": "string"}}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}},
        {"$ref": "#"},
        {"items": True, "additionalProperties": False},
        {"anyOf": [True, {"type": "string"}], "title": "A", "default": "a", "description": "what it is"},
        {"type": "number", "anyOf": [{"type": "integer"}, {"type": "number", "minimum": 3}]},
        {"type": ["string", "null"], "enum": ["a", None]},
        {"type": "string", "const": "a", "title": "Kind"},
        {"type": "integer", "enum": [1, 2.0]},
        {"type": "object", "required": ["a"], "properties": {"a": {"type": "string"}}},
        {"type": "string", "pattern": r"^(a$|[$^(?=]\$|\(?=b)$"},
        {"type": ["string", "integer"], "minimum": 3, "pattern": "^a$"},
        {"oneOf": [{"$ref": "#/$defs/a"}], "discriminator": {"propertyName": "x"}, "$defs": {"a": True}},
    ],
)
async def test_what_only_looks_like_it_is_left_to_the_compiler(given: dict[str, Any]) -> None:
    assert [spec.kind for spec in specs_of(asked(json=given))] == ["json"]

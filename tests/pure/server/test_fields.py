"""What each field of a request may hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_count_tokens_params as beta_count_tokens_params
from anthropic.types.beta import message_create_params as beta_message_create_params
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from server.errors import BadRequest
from server.inference.dialects.base import Dialect
from server.inference.dialects.fields import RESERVED
from server.inference.dialects.registry import DIALECTS, SURFACES
from server.inference.dialects.responses import _STATEFUL
from server.inference.dialects.scoring import Scoring

TURN = {"role": "user", "content": "hi"}
LEAST: Mapping[str, dict[str, Any]] = {
    "chat": {"messages": [TURN]},
    "completion": {"prompt": "hi"},
    "responses": {"input": "hi"},
    "messages": {"messages": [TURN], "max_tokens": 5},
    "embedding": {"input": "hi"},
    "count_tokens": {"messages": [TURN]},
}
# Headers that Anthropic's SDK makes of arguments, which are no part of a body; harmless there too.
SDKS: list[tuple[str, Any]] = [
    ("chat", chat_create_params.CompletionCreateParamsStreaming),
    ("completion", completion_create_params.CompletionCreateParamsStreaming),
    ("responses", response_create_params.ResponseCreateParamsStreaming),
    ("embedding", embedding_create_params.EmbeddingCreateParams),
    ("messages", message_create_params.MessageCreateParamsStreaming),
    ("messages", beta_message_create_params.MessageCreateParamsStreaming),
    ("count_tokens", message_count_tokens_params.MessageCountTokensParams),
    ("count_tokens", beta_count_tokens_params.MessageCountTokensParams),
]


def fields_of(params: Any) -> Iterator[tuple[str, str]]:
    for one in params:
        kind, form = one
        for name in sorted(form.__required_keys__ | form.__optional_keys__):
            yield kind, name


@pytest.mark.parametrize(("kind", "name"), sorted(set(fields_of(SDKS))))
def test_each_field_of_the_vendors_sdks_is_known(kind: str, name: str) -> None:
    """A new field of theirs fails here: it is to be honoured, an advice, or refused with a reason."""
    dialect = DIALECTS[kind]
    body = {**LEAST[kind], name: LEAST[kind].get(name)}
    kept = dialect.allowed_fields(body)
    assert kept.get(name) == LEAST[kind].get(name) or name in ("model", "store")


@pytest.mark.parametrize(("kind", "name"), sorted(set(fields_of(SDKS))))
def test_what_is_refused_of_the_vendors_has_a_reason(kind: str, name: str) -> None:
    dialect = DIALECTS[kind]
    if name in dialect.accepted | dialect.ignored:
        return
    with pytest.raises(BadRequest) as refused:
        dialect.allowed_fields({**LEAST[kind], name: {"anything": 1}})
    assert refused.value.param == name
    stateful = kind == "responses" and name in _STATEFUL
    assert refused.value.code == ("stateless" if stateful else "unsupported_parameter")
    assert len(refused.value.message) > len(name) + 20


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("chat", {"modalities": ["text"], "verbosity": "low", "prompt_cache_retention": "24h"}),
        ("chat", {"prediction": {"type": "content", "content": "x"}, "prompt_cache_options": {"ttl": "30m"}}),
        ("chat", {"functions": [], "function_call": "auto", "length_penalty": 1.0, "use_beam_search": False}),
        ("chat", {"best_of": 1, "logits_processors": None, "guided_whitespace_pattern": "[ ]?"}),
        ("chat", {"stream_interval": 5, "cache_salt": None, "chat_template": None, "priority": None}),
        ("completion", {"best_of": 1}),
        ("completion", {"best_of": 3, "n": 3}),
        ("completion", {"suffix": ""}),
        ("responses", {"context_management": [{"type": "compaction"}], "background": False}),
        ("messages", {"context_management": {"edits": [{"type": "clear_thinking"}]}, "speed": "fast"}),
        ("messages", {"mcp_servers": [], "fallbacks": "default", "container": None}),
    ],
)  # fmt: skip
def test_what_asks_for_nothing_is_accepted_and_goes_no_further(kind: str, fields: dict[str, Any]) -> None:
    plain = LEAST[kind] | ({"n": fields["n"]} if "n" in fields else {})
    dialect = DIALECTS[kind]
    assert dialect.allowed_fields({**LEAST[kind], **fields}) == dialect.allowed_fields(plain)


@pytest.mark.parametrize(
    ("kind", "name", "value", "reason"),
    [
        ("chat", "functions", [{"name": "f"}], "Send tools"),
        ("chat", "modalities", ["text", "audio"], "Answers are text"),
        ("chat", "length_penalty", 1.5, "beam search"),
        ("chat", "use_beam_search", 0, "Beam search"),
        ("chat", "use_beam_search", True, "Beam search"),
        ("completion", "best_of", 2, "send n"),
        ("responses", "min_tokens", 2, "/v1/chat/completions"),
        ("messages", "mcp_servers", [{"url": "http://x"}], "No tool runs here"),
        ("messages", "output_format", {"type": "json_schema"}, "output_config"),
        ("chat", "enable_thinking", False, "chat_template_kwargs"),
        ("chat", "reasoning", {"effort": "low"}, "reasoning_effort"),
        ("chat", "extra_body", {"top_k": 1}, "beside messages"),
    ],
)
def test_what_matters_and_is_not_served(kind: str, name: str, value: Any, reason: str) -> None:
    with pytest.raises(BadRequest, match=reason) as refused:
        DIALECTS[kind].allowed_fields({**LEAST[kind], name: value})
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", name)


@pytest.mark.parametrize("kind", LEAST)
@pytest.mark.parametrize("name", sorted(RESERVED))
def test_the_operators_fields(kind: str, name: str) -> None:
    assert DIALECTS[kind].allowed_fields({**LEAST[kind], name: None})
    with pytest.raises(BadRequest, match="decided by whoever operates this server") as refused:
        DIALECTS[kind].allowed_fields({**LEAST[kind], name: 1})
    assert (refused.value.code, refused.value.param) == ("unknown_field", name)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_k": 5.0}, "top_k"),
        ({"top_k": "5"}, "top_k"),
        ({"min_p": "0.5"}, "min_p"),
        ({"repetition_penalty": True}, "repetition_penalty"),
        ({"repetition_penalty": 1e-30}, "repetition_penalty"),
        ({"min_tokens": 2.0}, "min_tokens"),
        ({"ignore_eos": "true"}, "ignore_eos"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"stream": "false"}, "stream"),
        ({"stop_token_ids": ["5"]}, "stop_token_ids.0"),
        ({"stop_token_ids": [5, 5.0]}, "stop_token_ids.1"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"allowed_token_ids": [True]}, "allowed_token_ids.0"),
        ({"logit_bias": {"5": "1"}}, "logit_bias.5"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs.tokenize"),
        ({"chat_template_kwargs": {"tokenizer_kwargs": {}}}, "chat_template_kwargs.tokenizer_kwargs"),
        ({"chat_template_kwargs": {"max_length": 1}}, "chat_template_kwargs.max_length"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {str(n): 1 for n in range(33)}}, "chat_template_kwargs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "_backend": "x"}}, "structured_outputs._backend"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "structured_outputs"),
    ],
)
def test_nothing_is_read_as_something_else(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        DIALECTS["chat"].allowed_fields({**LEAST["chat"], **fields})
    assert refused.value.param == param


def bodies(path: str, value: Any) -> dict[str, Any]:
    """A body that has ``value`` there; ``*`` is the second item of an array."""
    made: Any = value
    for name in reversed(path.split(".")):
        made = [{}, made] if name == "*" else {name: made}
    found: dict[str, Any] = made
    return found


INSIDE = [(kind, path) for kind, paths in {
    "chat": (
        "stream_options.include_usage", "stream_options.include_obfuscation",
        "response_format.json_schema.strict", "tools.*.function.strict", "tools.*.strict",
        "tools.*.function.defer_loading",
        "messages.*.tools.*.function.strict", "structured_outputs.disable_any_whitespace",
    ),
    "completion": ("stream_options.include_usage", "response_format.json_schema.strict"),
    "responses": ("stream_options.include_obfuscation", "text.format.strict", "tools.*.strict"),
    "messages": (
        "tool_choice.disable_parallel_tool_use", "tools.*.strict", "tools.*.defer_loading",
        "messages.*.content.*.is_error",
    ),
    "count_tokens": ("tool_choice.disable_parallel_tool_use", "messages.*.content.*.is_error"),
}.items() for path in paths]  # fmt: skip


@pytest.mark.parametrize(("kind", "path"), INSIDE)
@pytest.mark.parametrize("value", ["true", "yes", 1, 0, 1.0, {}])
def test_what_is_inside_a_field_is_not_read_as_a_boolean(kind: str, path: str, value: Any) -> None:
    with pytest.raises(BadRequest, match="expected a boolean") as refused:
        DIALECTS[kind].allowed_fields({**LEAST[kind], **bodies(path, value)})
    assert refused.value.param == path.replace("*", "1")


@pytest.mark.parametrize(
    ("kind", "path"),
    [("chat", "stream_options.include_usage"), ("messages", "tool_choice.disable_parallel_tool_use")],
)
@pytest.mark.parametrize("value", [True, False, None])
def test_booleans_inside_a_field_are_taken(kind: str, path: str, value: Any) -> None:
    body = bodies(path, value)
    kept = DIALECTS[kind].allowed_fields({**LEAST[kind], **body})
    assert kept | body == kept


@pytest.mark.parametrize("kind", ["messages", "count_tokens"])
@pytest.mark.parametrize("value", ["2048", 2048.0, True, 2**31])
def test_a_budget_of_thinking_is_a_whole_number(kind: str, value: Any) -> None:
    thinking = {"type": "enabled", "budget_tokens": value}
    with pytest.raises(BadRequest, match=r"integer|at most") as refused:
        DIALECTS[kind].allowed_fields({**LEAST[kind], "thinking": thinking})
    assert refused.value.param == "thinking.budget_tokens"


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("chat", "logprobs", "true"),
        ("chat", "logprobs", 1),
        ("completion", "logprobs", True),
        ("completion", "logprobs", "1"),
        ("responses", "store", 0),
        ("responses", "background", ""),
    ],
)
def test_fields_that_are_something_else_elsewhere(kind: str, name: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=r"expected an? (boolean|integer)") as refused:
        DIALECTS[kind].allowed_fields({**LEAST[kind], name: value})
    assert refused.value.param == name


def test_the_older_names_of_a_constraint() -> None:
    kept = DIALECTS["chat"].allowed_fields(
        {**LEAST["chat"], "guided_choice": ["a", "b"], "guided_json": None}
    )
    assert kept["structured_outputs"] == {"choice": ["a", "b"]}
    assert "guided_choice" not in kept


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("format_", [{"name": "x"}, {"name": "x", "schema": None}, None])
def test_a_format_by_schema_has_one(kind: str, format_: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": format_}
    with pytest.raises(BadRequest, match="is needed") as refused:
        DIALECTS[kind].allowed_fields({**LEAST[kind], "response_format": wanted})
    assert refused.value.param == "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        ("chat", {"messages": []}, "messages"),
        ("messages", {"messages": []}, "messages"),
        ("count_tokens", {"messages": []}, "messages"),
        ("responses", {"input": []}, "input"),
        ("completion", {"prompt": []}, "prompt"),
        ("completion", {"prompt": ""}, "prompt"),
        ("completion", {"prompt": None}, "prompt"),
        ("chat", {"messages": [TURN, {"role": "user", "content": {"type": "text"}}]}, "messages.1.content"),
        ("messages", {"messages": [{"role": "user", "content": {"text": "x"}}]}, "messages.0.content"),
        ("responses", {"input": [{"role": "user", "content": {"text": "x"}}]}, "input.0.content"),
        ("chat", {"max_completion_tokens": 0}, "max_completion_tokens"),
        ("chat", {"max_completion_tokens": -1}, "max_completion_tokens"),
        ("chat", {"max_tokens": 0}, "max_tokens"),
        ("completion", {"max_tokens": -1}, "max_tokens"),
        ("responses", {"max_output_tokens": 0}, "max_output_tokens"),
        ("messages", {"max_tokens": 0}, "max_tokens"),
    ],
)
def test_nothing_to_say(kind: str, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest, match=f"^{param}") as refused:
        DIALECTS[kind].allowed_fields({**LEAST[kind], **fields})
    assert refused.value.param == param


def test_a_prompt_may_be_echoed_alone() -> None:
    assert DIALECTS["completion"].allowed_fields({**LEAST["completion"], "max_tokens": 0})["max_tokens"] == 0


def test_a_message_that_is_gone_on_with() -> None:
    kept = DIALECTS["chat"].allowed_fields({**LEAST["chat"], "continue_final_message": True})
    assert kept["add_generation_prompt"] is False


LARGEST = 2**31 - 1


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("chat", "top_k"),
        ("chat", "thinking_token_budget"),
        ("chat", "max_completion_tokens"),
        ("completion", "prompt_logprobs"),
        ("completion", "min_tokens"),
        ("completion", "truncate_prompt_tokens"),
        ("responses", "max_output_tokens"),
        ("responses", "max_tool_calls"),
        ("messages", "top_k"),
        ("embedding", "dimensions"),
    ],
)
def test_whole_numbers_fit_the_engines_arrays(kind: str, name: str) -> None:
    """A larger one would end a step on a GPU, or stay behind in the engine's front end as a request."""
    dialect = DIALECTS[kind]
    assert dialect.allowed_fields({**LEAST[kind], name: LARGEST})[name] == LARGEST
    for value in (LARGEST + 1, -LARGEST - 1, 2**63, 10**30):
        with pytest.raises(BadRequest, match=str(LARGEST)) as refused:
            dialect.allowed_fields({**LEAST[kind], name: value})
        assert refused.value.param == name


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1, True]}, "prompt.1"),
        ({"prompt": [1, "a"]}, "prompt.1"),
        ({"prompt": [[1], [1, 2.0]]}, "prompt.1.1"),
        ({"prompt": [1.0]}, "prompt"),
        ({"allowed_token_ids": [1, "2"]}, "allowed_token_ids.1"),
        ({"repetition_penalty": 1e308}, "repetition_penalty"),
        ({"repetition_penalty": 101}, "repetition_penalty"),
        ({"repetition_detection": {"max_pattern_size": 10**6}}, "repetition_detection.max_pattern_size"),
        ({"repetition_detection": {"min_count": "2"}}, "repetition_detection.min_count"),
        ({"repetition_detection": {"min_count": -1}}, "repetition_detection.min_count"),
    ],
)
def test_numbers_that_are_none_or_cost_too_much(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        DIALECTS["completion"].allowed_fields({"prompt": "hi", **changes})
    assert refused.value.param == param


def test_tokens_of_a_text_are_whole_numbers() -> None:
    for tokens in ([True], ["1"], [1.0], "1", {}):
        with pytest.raises(BadRequest, match="tokens"):
            DIALECTS["detokenize"].allowed_fields({"tokens": tokens})
    assert DIALECTS["detokenize"].allowed_fields({"tokens": [1, 2]})["tokens"] == [1, 2]


ODD: list[Any] = [
    True, 0, -1, 1.5, 10**30, float("inf"), "", "x", "\ud83d", [], [None], [[]], [{}], [1, "a"], {}, {"a": 1},
    {"type": []}, {"type": "function"}, {"choice": 5}, {"json": 5}, {"regex": ["a"]},
    {"type": "allowed_tools", "mode": "auto", "tools": 5},
    {"type": "allowed_tools", "allowed_tools": {"mode": [], "tools": [1]}},
    {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"function": {"name": []}}]}},
    [{"type": []}], [{"type": "function", "function": 5}], [{"role": 5, "content": {}}], [{"content": [5]}],
]  # fmt: skip


@pytest.mark.parametrize("dialect", SURFACES, ids=lambda dialect: dialect.operation)
def test_no_value_of_a_field_is_a_defect(dialect: Dialect) -> None:
    """It is taken, or refused as the client's mistake."""
    tools = {"tools": [{"type": "function", "name": "a", "function": {"name": "a"}}]}
    least = {**LEAST.get(dialect.name, {}), **(tools if "tools" in dialect.accepted else {})}
    for name in sorted(dialect.accepted | dialect.ignored | dialect.only.keys() | {"best_of", "store"}):
        for value in ODD:
            with contextlib.suppress(BadRequest):
                fields = dialect.allowed_fields({**least, name: value})
                if isinstance(dialect, Scoring):
                    dialect.asked(fields)

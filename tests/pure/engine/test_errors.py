"""vLLM's refusals as ours."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError, field_validator

from server.engine.errors import TOO_LONG, invalid_request, message_of, named, refusal
from server.errors import BadRequest, body_of
from server.inference.dialects.messages import anthropic_error

# As vLLM says it, in five places.
SAID = [
    "This model's maximum context length is 1024 tokens. However, your prompt contains at least 1025 input"
    " tokens, which exceeds this limit even without any output tokens. Please reduce the length of it.",
    "This model's maximum context length is 1024 tokens. However, your prompt contains 9000 characters (more"
    " than 7000 characters, which is the upper bound for 1024 input tokens). Please reduce the length of it.",
    "Input length (1100) exceeds model's maximum context length (1024).",
    "The decoder prompt (length 1100) is longer than the maximum model length of 1024. Make sure that"
    " `max_model_len` is no smaller than the number of text tokens.",
    "The decoder prompt (length 1024) plus the number of requested output tokens (at least 1) is longer than"
    " the maximum model length of 1024. Make sure that `max_model_len` is no smaller than that.",
]


@pytest.mark.parametrize("said", SAID)
def test_a_prompt_that_is_too_long_has_the_words_that_libraries_look_for(said: str) -> None:
    error = refusal(said, None)
    assert error.code == TOO_LONG
    assert error.message.startswith("This model's maximum context length is 1024 tokens. However, ")
    assert "max_model_len" not in error.message
    told = anthropic_error(body_of(error), 400)["error"]["message"]
    assert told.startswith("prompt is too long: ")
    assert told.endswith("> 1024 maximum")


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ("n must be at least 1, got 0.", "n"),
        ("presence_penalty must be in [-2, 2], got 3.0.", "presence_penalty"),
        ("stop cannot contain an empty string.", "stop"),
        ("logprobs: at most 20 can be asked for", "logprobs"),
        ("`top_logprobs` must be 0 or positive", "top_logprobs"),
        ("thinking.budget_tokens must be less than max_tokens", "thinking.budget_tokens"),
        ("The request must be shorter.", None),
    ],
)
def test_the_field_is_named_where_only_the_words_name_it(said: str, param: str | None) -> None:
    assert refusal(said, None).param == param


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "prompt list length 1025 exceeds the maximum allowed count of 1024. To increase this limit, set"
            " the VLLM_MAX_COMPLETION_PROMPTS environment variable.",
            "prompt list length 1025 exceeds the maximum allowed count of 1024.",
        ),
        (
            "You can only use one kind of structured outputs constraint but multiple are specified: {'json':"
            " {'type': 'object'}, 'regex': None}",
            "You can only use one kind of structured outputs constraint.",
        ),
        ("n must be at least 1, got 0.", "n must be at least 1, got 0."),
        ("no end", "no end"),
    ],
)
def test_a_client_is_told_what_it_can_do(said: str, told: str) -> None:
    """And not what whoever runs vLLM could, nor of what its objects consist."""
    assert refusal(said, None).message == told
    assert message_of(ValueError(said)) == told
    with pytest.raises(ValidationError) as caught:
        Judged(text=said)
    assert invalid_request(caught.value).message == f"text: {told}"


class Judged(BaseModel):
    text: str

    @field_validator("text")
    @classmethod
    def _never(cls, text: str) -> str:
        raise ValueError(text)


class Text(BaseModel):
    type: Literal["text"]
    text: str


class Picture(BaseModel):
    type: Literal["picture"]
    source: dict[str, str]


class Turn(BaseModel):
    role: str
    content: str | list[Text | Picture]


class Talk(BaseModel):
    messages: list[Turn]


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (5, "messages.0.content"),
        ([{"type": "text", "text": 5}], "messages.0.content.0.text"),
        ([{"type": "film"}], "messages.0.content.0.type"),
    ],
)
def test_what_is_wrong_in_a_part_is_named_without_the_names_of_types(content: Any, param: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Talk.model_validate({"messages": [{"role": "user", "content": content}]})
    error = invalid_request(caught.value)
    assert error.param == param
    assert error.message.startswith(f"{param}: ")


class Format(BaseModel):
    type: Literal["json_schema"]
    name: str


class Plain(BaseModel):
    type: Literal["text"]


class Asked(BaseModel):
    format: Plain | Format | None = None
    stop: str | Annotated[list[str], Field(max_length=2)] | None = None


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"format": {"type": "json_schema"}}, "format.name: Field required"),
        ({"format": {"type": "xml"}}, "format.type: Input should be 'text'"),
        ({"format": 5}, "format: Input should be a valid"),
        ({"stop": ["a", "b", "c"]}, "stop: List should have at most 2 items"),
        ({"stop": [5]}, "stop.0: Input should be a valid string"),
        ({"stop": 5}, "stop: Input should be a valid string"),
    ],
)
def test_of_a_union_the_member_that_was_meant_says_what_is_wrong(body: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Asked.model_validate(body)
    assert invalid_request(caught.value).message.startswith(said)


def test_a_part_is_named_by_the_messages_that_it_is_in() -> None:
    error = named(BadRequest("0.text: Field required", param="0.text"), "messages")
    assert (error.message, error.param) == ("a part in messages: 0.text: Field required", "messages")
    assert named(BadRequest("n: no", param="n"), "messages").param == "n"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_an_answer_that_would_be_longer_than_a_context(field: str) -> None:
    said = f"{field}=2000 cannot be greater than max_model_len=1024. Please request fewer output tokens."
    error = refusal(said, None)
    assert (error.code, error.param) == (TOO_LONG, field)
    assert error.message.startswith("This model's maximum context length is 1024 tokens. However, ")
    told = anthropic_error(body_of(error), 400)["error"]["message"]
    assert told.startswith("max_tokens: 2000 > 1024, which is the maximum "), "not the prompt"


def test_the_length_is_told_where_it_is_known() -> None:
    for said in SAID[2:4]:
        error = refusal(said, None)
        assert "has 1100 tokens" in error.message
        told = anthropic_error(body_of(error), 400)["error"]["message"]
        assert told == "prompt is too long: 1100 tokens > 1024 maximum"

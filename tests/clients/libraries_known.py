"""The rows and columns of the matrix."""

from __future__ import annotations

PYTHON = (
    "openai", "anthropic", "litellm", "langchain-openai", "pydantic-ai", "instructor", "llama-index",
    "haystack", "autogen", "agent-framework",
)  # fmt: skip
# Those that do not run with the others' openai yet: they have the environment `openai2` within the others'.
WITH_OPENAI_2 = frozenset({"llama-index", "agent-framework"})
JAVASCRIPT = ("openai (JS)", "anthropic (JS)", "Vercel AI SDK")
CHECKS = (
    "chat", "stream", "tools: auto", "tools: required", "tools: named", "tools: parallel",
    "structured output", "responses", "embeddings", "errors", "retries",
)  # fmt: skip
NOT_THERE, NOT_TRIED = "–", "?"
_ANTHROPIC = "Anthropic's API has none"
# Why a library has no cell: (library, check) -> the reason. Every other cell is tried, or `?`.
REASONS: dict[tuple[str, str], str] = {
    ("anthropic", "responses"): _ANTHROPIC,
    ("anthropic", "embeddings"): _ANTHROPIC,
    ("anthropic (JS)", "responses"): _ANTHROPIC,
    ("anthropic (JS)", "embeddings"): _ANTHROPIC,
    ("pydantic-ai", "tools: named"): "an agent forces one of its outputs, not a tool by its name",
    ("instructor", "tools: auto"): "it forces the one tool that it makes of a model",
    ("instructor", "tools: required"): "it forces the one tool that it makes of a model, by its name",
    ("instructor", "embeddings"): "it makes no embeddings",
    ("autogen", "responses"): "its client speaks chat alone",
    ("autogen", "embeddings"): "it makes no embeddings",
}
WHY_NOT = (
    "`–`: the library has no such thing; the reasons are below. `?`: it has, or may have, and is not tried."
    " `make clients\nLIBRARY=…` writes the row of one library anew."
)
# What is tried on a base that makes embeddings instead of text, by ``libraries.py LIBRARY embeddings``.
EMBEDDINGS = "embeddings"
EMBEDDERS = (
    "openai", "litellm", "langchain-openai", "pydantic-ai", "llama-index", "haystack", "agent-framework",
)  # fmt: skip
JAVASCRIPT_EMBEDDERS = ("openai (JS)", "Vercel AI SDK")

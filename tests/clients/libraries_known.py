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
NOT_THERE = "–"
WHY_NOT = (
    "`–`: the library has no such thing, or does it as the library in another row that it is built on."
    " `?`: not tried on the\nreal engine as it is now. `make clients LIBRARY=…` writes the row of one library"
    " anew."
)
# What is tried on a base that makes embeddings instead of text, by ``libraries.py LIBRARY embeddings``.
EMBEDDINGS = "embeddings"
EMBEDDERS = ("openai", "litellm", "langchain-openai", "llama-index", "haystack", "agent-framework")
JAVASCRIPT_EMBEDDERS = ("openai (JS)", "Vercel AI SDK")

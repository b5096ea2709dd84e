"""Which of vLLM's parsers reads a base model's tool calls and reasoning, by what its chat template writes.

A model calls tools in the form that its template shows it, so the marks of that form in the template tell
the parser. Pure: the names are vLLM's, and nothing of vLLM is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# The first whose marks are all in the template wins: forms that contain another one's marks come first.
_TOOLS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qwen3_coder", ("<tool_call>", "<function=", "<parameter=")),
    ("glm45", ("<tool_call>", "<arg_key>")),
    ("minimax_m2", ("minimax:tool_call",)),
    ("seed_oss", ("seed:tool_call",)),
    ("longcat", ("<longcat_tool_call>",)),
    ("hermes", ("<tool_call>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("deepseek_v31", ("<｜tool▁calls▁begin｜>", "thinking")),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>",)),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("lfm2", ("<|tool_call_start|>",)),
    ("internlm", ("<|action_start|>",)),
    ("functiongemma", ("<start_function_call>",)),
    ("phi4_mini_json", ("<|tool|>",)),
    ("granite", ("<|tool_call|>",)),
    ("llama4_pythonic", ("<|python_start|>",)),
    ("llama3_json", ("ipython",)),
    ("llama3_json", ("<|python_tag|>",)),
)
_REASONING: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("glm45", ("<think>", "<arg_key>")),
    ("qwen3", ("<think>", "enable_thinking")),
    ("seed_oss", ("<seed:think>",)),
    ("minimax_m2", ("minimax:tool_call", "<think>")),
    ("mistral", ("[THINK]",)),
    ("kimi_k2", ("◁think▷",)),
)
# Told by the model, whose template says nothing of it or too much.
_TOOLS_OF_TYPE = {"gpt_oss": "openai", "jamba": "jamba", "hunyuan_v1_moe": "hunyuan_a13b"}
_REASONING_OF_TYPE = {
    "gpt_oss": "openai_gptoss",
    "hunyuan_v1_moe": "hunyuan_a13b",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
}
# Where the template shows no tools: the commonest form, for calls that a request forces.
UNSHOWN = "hermes"
AUTO, NONE = "auto", "none"


@dataclass(frozen=True, slots=True)
class Parsers:
    """vLLM's names, None for no parser. ``tools_shown`` is whether the template shows tools to the model."""

    tools: str | None
    reasoning: str | None
    tools_shown: bool

    def as_json(self) -> dict[str, Any]:
        return {
            "tool_parser": self.tools,
            "reasoning_parser": self.reasoning,
            "tools_shown": self.tools_shown,
        }


def parsers_of(template: str | None, model_type: str, *, tools: str = AUTO, reasoning: str = AUTO) -> Parsers:
    """``tools`` and ``reasoning`` are the settings: ``auto``, ``none`` or a parser's name."""
    text = template or ""
    shown = "tools" in text or model_type in _TOOLS_OF_TYPE
    found = _TOOLS_OF_TYPE.get(model_type) or (_first(_TOOLS, text) if shown else None)
    reads = _REASONING_OF_TYPE.get(model_type) if "<think>" in text or model_type == "gpt_oss" else None
    reads = reads or _first(_REASONING, text)
    if reads is None and "<think>" in text and "</think>" in text:
        reads = "deepseek_r1"
    return Parsers(_chosen(tools, found or UNSHOWN), _chosen(reasoning, reads), shown)


def _first(forms: tuple[tuple[str, tuple[str, ...]], ...], text: str) -> str | None:
    return next((name for name, marks in forms if all(mark in text for mark in marks)), None)


def _chosen(setting: str, found: str | None) -> str | None:
    if setting == NONE:
        return None
    return found if setting == AUTO else setting

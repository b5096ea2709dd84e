"""Which of vLLM's parsers reads a base model's tool calls and reasoning, by what its chat template writes.

A model calls tools in the form that its template shows it, so the marks of that form in the template tell
the parser. Pure: the names are vLLM's, and nothing of vLLM is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

UNREAD = ""  # for a form that none of vLLM's parsers reads
# The first whose marks are all in the template wins: forms that contain another one's marks come first.
_TOOLS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (UNREAD, ("<function=example_function_name>", "ipython")),  # Functionary's
    ("minicpm5", ("<function name=", "<param name=")),
    ("qwen3_coder", ("<tool_call>", "<function=", "<parameter=")),
    ("poolside_v1", ("<tool_call>", "<arg_key>", "<assistant>")),
    ("ling3", ("<tool_call>", "<arg_key>", "<|role_end|>")),
    ("glm45", ("<tool_call>", "<arg_key>")),
    ("hy_v3", ("<tool_calls", "<tool_sep", "<arg_key")),
    ("hy_v4", ("<tool_calls", "<arg_key")),
    ("minimax_m3", ("]<]minimax[>[",)),
    ("minimax_m2", ("minimax:tool_call",)),
    ("seed_oss", ("seed:tool_call",)),
    ("longcat", ("<longcat_tool_call>",)),
    ("ernie45", ("<tool_call>", "<response>", "</think>")),
    ("granite4", ("<tool_call>", "<|start_of_role|>")),
    ("hermes", ("<tool_call>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>", "```json")),
    ("deepseek_v31", ("<｜tool▁calls▁begin｜>", "thinking")),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>",)),
    ("deepseek_v41", ("｜DSML｜", " calls>")),
    ("deepseek_v32", ("｜DSML｜", "function_calls")),
    ("deepseek_v4", ("｜DSML｜", "tool_calls")),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("kimi_k3", ("<|open|>", "<|close|>", "<|sep|>")),
    ("lfm2", ("<|tool_call_start|>",)),
    ("lfm2", ("<|tool_list_start|>",)),
    ("internlm", ("<|action_start|>",)),
    ("functiongemma", ("<start_function_call>",)),
    ("gemma4", ("<|tool_call>",)),
    ("phi4_mini_json", ("<|tool|>",)),
    ("granite", ("<|tool_call|>",)),
    ("granite-20b-fc", ("<function_call>",)),
    ("cohere_command4", ("<|START_ACTION|>", "<|START_TEXT|>")),
    ("cohere_command3", ("<|START_ACTION|>",)),
    ("step3", ("<｜tool_calls_begin｜>",)),
    ("apertus", ("<|tools_prefix|>",)),
    ("olmo3", ("<function_calls>",)),
    ("dots", ("<dots_function_call>",)),
    ("gigachat3", ("<|function_call|>",)),
    ("gigachat3", ("'function call'", "<|role_sep|>")),
    ("k2_horizon", ("<ifm|tool_calls>",)),
    ("inkling", ("<|content_invoke_tool_json|>",)),
    ("plamo3", ("<|plamo:begin_tool_requests:plamo|>",)),
    ("muse_glimmer", ("<atem:function_calls>",)),
    ("llama4_pythonic", ("<|python_start|>",)),
    ("llama3_json", ("Environment: ipython",)),
    ("llama3_json", ("<|python_tag|>",)),
)
_REASONING: tuple[tuple[str, tuple[str, ...]], ...] = (
    (UNREAD, ("<think></think>", "<response></response>", "<|start_of_role|>")),  # Granite 3.3's
    ("poolside_v1", ("<think>", "<arg_key>", "<assistant>")),
    ("ling3", ("<think>", "<arg_key>", "<|role_end|>")),
    ("glm45", ("<think>", "<arg_key>")),
    ("hy_v3", ("<think", "<tool_calls", "<tool_sep", "<arg_key")),
    ("hy_v4", ("<think", "<tool_calls", "<arg_key")),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>", "thinking", "</think>")),
    ("deepseek_v41", ("｜DSML｜", " calls>", "</think>")),
    ("deepseek_v4", ("｜DSML｜", "tool_calls", "</think>")),
    ("granite_thinking_parser", ("<think>", "<|start_of_role|>")),
    ("minimax_m2", ("minimax:tool_call", "<think>")),
    ("ernie45", ("<think>", "<response>")),
    ("qwen3", ("<think>", "enable_thinking")),
    ("seed_oss", ("<seed:think>",)),
    ("minimax_m3", ("<mm:think>",)),
    ("mistral", ("[THINK]",)),
    ("kimi_k2", ("◁think▷",)),
    ("kimi_k2", ("<|tool_calls_section_begin|>", "</think>")),
    ("kimi_k3", ("<|open|>", "<|close|>", "<|sep|>")),
    ("step3", ("<｜tool_calls_begin｜>", "<think>")),
    ("gemma4", ("<|channel>",)),
    ("granite", ("Here is my thought process",)),
    ("cohere_command4", ("<|START_THINKING|>", "<|START_TEXT|>")),
    ("cohere_command3", ("<|START_THINKING|>",)),
    ("k2_horizon", ("<ifm|think>",)),
    ("inkling", ("<|content_thinking|>",)),
    ("plamo3", ("<|plamo:begin_think:plamo|>",)),
    ("muse_glimmer", ("to=self<|message|>",)),
)
# The template shows tools, and no call: these models write theirs so.
_TOOLS_UNMARKED = {"lfm2": "lfm2", "lfm2_moe": "lfm2"}
# Told by the model, whose template says nothing of it or too much.
_TOOLS_OF_TYPE = {
    "bailing_moe_v3_vl": "ling3",
    "deepseek_v32": "deepseek_v32",
    "deepseek_v4": "deepseek_v4",
    "gpt_oss": "openai",
    "hunyuan_v1_moe": "hunyuan_a13b",
    "jamba": "jamba",
    "mimo_v2": "mimo",
    "step3p5": "step3p5",
}
_REASONING_OF_TYPE = {
    "bailing_moe_v3_vl": "ling3",
    "deepseek_v32": "deepseek_v3",
    "deepseek_v4": "deepseek_v4",
    "gpt_oss": "openai_gptoss",
    "hunyuan_v1_moe": "hunyuan_a13b",
    "mimo_v2": "mimo",
    "nemotron_h": "nemotron_v3",
    "olmo3": "olmo3",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
    "step3p5": "step3p5",
}
# These have no template, or one that does not show their thoughts: the type alone says it.
_WITHOUT_THINK = ("deepseek_v32", "deepseek_v4", "gpt_oss")
# vLLM's names that no template tells: by the setting alone.
NOT_TOLD = {
    "glm47": "glm45 by another name",
    "hf": "reads what the tokenizer says of its answers, beside no other parser",
    "llama4_json": "llama3_json by another name",
    "pythonic": "models write such calls without a mark, and their templates show other forms too",
    "qwen3_json": "hermes by another name",
    "qwen3_xml": "qwen3_coder by another name",
    "xlam": "reads several forms, whose marks are other parsers'",
}
REASONING_NOT_TOLD = {
    "glm47": "glm45 by another name",
    "hf": NOT_TOLD["hf"],
    "holo2": "deepseek_v3 for models that think unless told not to",
    "minicpmv": "marks are Qwen's; minds a tokenizer of its own",
    "minimax_m2_append_think": "minimax_m2 that leaves thoughts in the answer",
}
# Where the template shows no tools, or in a form that is in no list: the commonest one, for calls that a
# request forces.
UNSHOWN = "hermes"
AUTO, NONE = "auto", "none"


def told() -> tuple[set[str], set[str]]:
    """vLLM's parsers of tools and of reasoning that a base may get by itself."""
    tools = {name for name, _ in _TOOLS} | {*_TOOLS_OF_TYPE.values()}
    reasoning = {name for name, _ in _REASONING} | {*_REASONING_OF_TYPE.values(), _PLAIN}
    return tools - {UNREAD}, reasoning - {UNREAD}


_PLAIN = "deepseek_r1"  # for <think> … </think> and nothing else that tells


@dataclass(frozen=True, slots=True)
class Parsers:
    """vLLM's names, None for no parser. ``tools_shown`` is whether the template shows tools to the model.

    ``tools_guessed``: it does, in a form that is none of those known; calls may come back as text.
    """

    tools: str | None
    reasoning: str | None
    tools_shown: bool
    tools_guessed: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "tool_parser": self.tools,
            "reasoning_parser": self.reasoning,
            "tools_shown": self.tools_shown,
            "tools_guessed": self.tools_guessed,
        }


def parsers_of(template: str | None, model_type: str, *, tools: str = AUTO, reasoning: str = AUTO) -> Parsers:
    """``tools`` and ``reasoning`` are the settings: ``auto``, ``none`` or a parser's name."""
    text = template or ""
    shown = "tools" in text or model_type in _TOOLS_OF_TYPE
    found = _TOOLS_OF_TYPE.get(model_type) or _first(_TOOLS, text)
    if found is None and shown:
        found = _TOOLS_UNMARKED.get(model_type)
    thinks = "<think>" in text or model_type in _WITHOUT_THINK
    reads = _REASONING_OF_TYPE.get(model_type) if thinks else None
    reads = reads or _first(_REASONING, text)
    if reads is None and "<think>" in text and "</think>" in text:
        reads = _PLAIN
    guessed = shown and not found and tools == AUTO
    return Parsers(_chosen(tools, found or UNSHOWN), _chosen(reasoning, reads or None), shown, guessed)


def _first(forms: tuple[tuple[str, tuple[str, ...]], ...], text: str) -> str | None:
    return next((name for name, marks in forms if all(mark in text for mark in marks)), None)


def _chosen(setting: str, found: str | None) -> str | None:
    if setting == NONE:
        return None
    return found if setting == AUTO else setting

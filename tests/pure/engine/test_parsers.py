"""Which parser a chat template calls for. The templates are the parts of real ones that tell."""

from __future__ import annotations

import pytest

from server.engine.parsers import parsers_of

TOOLS = "{%- if tools %}{{ tools | tojson }}{%- endif %}"
QWEN = TOOLS + '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
QWEN3 = QWEN + "{%- if enable_thinking is false %}<think>\n\n</think>\n\n{%- endif %}"
CODER = TOOLS + "<tool_call>\n<function=example>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
LLAMA = "{%- if tools is not none %}Environment: ipython{%- endif %}"
SMOL = "{% for message in messages %}<|im_start|>{{ message.role }}{% endfor %}"


@pytest.mark.parametrize(
    ("model_type", "template", "tools", "reasoning", "shown"),
    [
        ("qwen2", QWEN, "hermes", None, True),
        ("qwen3", QWEN3, "hermes", "qwen3", True),
        ("qwen3_moe", CODER, "qwen3_coder", None, True),
        ("llama", LLAMA, "llama3_json", None, True),
        ("llama4", TOOLS + "<|python_start|>ipython", "llama4_pythonic", None, True),
        ("mistral", "{{ tools }}[AVAILABLE_TOOLS][TOOL_CALLS]", "mistral", None, True),
        ("mistral3", "{{ tools }}[TOOL_CALLS][THINK]", "mistral", "mistral", True),
        (
            "qwen2",
            TOOLS + "<｜tool▁calls▁begin｜><think>\n{{ '</think>' }}",
            "deepseek_v3",
            "deepseek_r1",
            True,
        ),
        ("glm4_moe", TOOLS + "<tool_call>{name}<arg_key></arg_key><think>", "glm45", "glm45", True),
        ("phi3", "{{ tools }}<|tool|>", "phi4_mini_json", None, True),
        ("gpt_oss", None, "openai", "openai_gptoss", True),
        ("llama", SMOL, "hermes", None, False),
        ("llama", None, "hermes", None, False),
    ],
)
def test_by_the_template(
    model_type: str, template: str | None, tools: str, reasoning: str | None, shown: bool
) -> None:
    found = parsers_of(template, model_type)
    assert (found.tools, found.reasoning, found.tools_shown) == (tools, reasoning, shown)


def test_settings_go_first() -> None:
    found = parsers_of(QWEN3, "qwen3", tools="xlam", reasoning="none")
    assert (found.tools, found.reasoning) == ("xlam", None)
    assert parsers_of(QWEN3, "qwen3", tools="none").tools is None
    assert found.as_json() == {"tool_parser": "xlam", "reasoning_parser": None, "tools_shown": True}

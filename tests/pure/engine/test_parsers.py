"""Which parser a chat template calls for. The templates are the parts of real ones that tell."""

from __future__ import annotations

import pytest

from server.engine.parsers import parsers_of

TOOLS = "{%- if tools %}{{ tools | tojson }}{%- endif %}"
QWEN = TOOLS + '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
QWEN3 = QWEN + "{%- if enable_thinking is false %}<think>\n\n</think>\n\n{%- endif %}"
CODER = TOOLS + "<tool_call>\n<function=example>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
LLAMA = "{%- if tools is not none %}Environment: ipython{%- endif %}"
R1 = "{{ '<｜tool▁calls▁begin｜>' + call.name + '\n```json\n' }}"
GIGACHAT = TOOLS + "{'role': 'function call'} role_sep='<|role_sep|>\n'"
LFM2 = TOOLS + "List of tools: "
MINIMAX = TOOLS + "minimax:tool_call <think>{%- if '<response>' in content %}{%- endif %}</think>"
GRANITE_33 = TOOLS + "<|start_of_role|><|tool_call|>between <think></think> and <response></response>"
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
        (
            "cohere2",
            TOOLS + "<|START_ACTION|><|START_THINKING|><|START_RESPONSE|>",
            *["cohere_command3"] * 2,
            True,
        ),
        (
            "cohere2",
            TOOLS + "<|START_ACTION|><|START_THINKING|><|START_TEXT|>",
            *["cohere_command4"] * 2,
            True,
        ),
        ("gemma4", TOOLS + "<|tool_call>call:f{}<tool_call|><|channel>thought", "gemma4", "gemma4", True),
        ("olmo3", TOOLS + "<functions></functions><function_calls>", "olmo3", None, True),
        ("olmo3", TOOLS + "<function_calls><think>", "olmo3", "olmo3", True),
        (
            "step3_text",
            TOOLS + '<｜tool_calls_begin｜><steptml:invoke name="f"><think>',
            "step3",
            "step3",
            True,
        ),
        ("step3p5", CODER + "<think>", "step3p5", "step3p5", True),
        ("apertus", TOOLS + '<|tools_prefix|>[{"f": {}}]<|tools_suffix|>', "apertus", None, True),
        (
            "granite",
            TOOLS + "<|start_of_role|><|tool_call|>Here is my thought process:",
            *["granite"] * 2,
            True,
        ),
        ("granitemoehybrid", TOOLS + "<|start_of_role|><tool_call>", "granite4", None, True),
        ("nemotron_h", CODER + "<think>enable_thinking", "qwen3_coder", "nemotron_v3", True),
        ("kimi_k2", TOOLS + "<|tool_calls_section_begin|><think></think>", "kimi_k2", "kimi_k2", True),
        (
            "deepseek_v3",
            TOOLS + "{{thinking}}<｜tool▁calls▁begin｜></think>",
            "deepseek_v31",
            "deepseek_v3",
            True,
        ),
        ("deepseek_v32", None, "deepseek_v32", "deepseek_v3", True),
        ("gpt_oss", None, "openai", "openai_gptoss", True),
        ("deepseek_v3", R1 + "{%- if thinking %}{%- endif %}", "deepseek_v3", None, False),
        ("qwen2", R1 + "{%- if enable_thinking %}<think></think>", "deepseek_v3", "deepseek_v3", False),
        ("bailing_hybrid", TOOLS + "<|role_end|><tool_call><arg_key><think>", "ling3", "ling3", True),
        ("deepseek_v3", GIGACHAT, "gigachat3", None, True),
        ("lfm2", LFM2 + "<|tool_list_start|>", "lfm2", None, True),
        ("lfm2_moe", LFM2 + "[", "lfm2", None, True),
        ("lfm2", SMOL, "hermes", None, False),
        ("minimax_m2", MINIMAX, "minimax_m2", "minimax_m2", True),
        ("granite", GRANITE_33, "granite", None, True),
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
    assert found.as_json() == {
        "tool_parser": "xlam",
        "reasoning_parser": None,
        "tools_shown": True,
        "tools_guessed": False,
    }


def test_a_form_that_is_not_known_is_said() -> None:
    minimax_m1 = TOOLS + "{%- if message.role == 'ipython' %}<tool_calls>{%- endif %}"
    functionary = TOOLS + "Environment: ipython <function=example_function_name>{}</function>"
    for form in (minimax_m1, functionary):
        assert parsers_of(form, "llama").tools_guessed
    unknown = TOOLS + "<<call me: f>>"
    found = parsers_of(unknown, "new")
    assert (found.tools, found.tools_shown, found.tools_guessed) == ("hermes", True, True)
    for known in (
        parsers_of(QWEN, "qwen2"),
        parsers_of(SMOL, "llama"),
        parsers_of(unknown, "new", tools="xlam"),
        parsers_of(unknown, "new", tools="none"),
    ):
        assert not known.tools_guessed

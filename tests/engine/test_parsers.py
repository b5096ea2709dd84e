"""vLLM's parsers and ours of them: what a new release brings is told by a mark, or listed as not told."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from server.engine import arguments
from server.engine.parsers import NOT_TOLD, REASONING_NOT_TOLD, told
from tests.support.tiny import settings


def test_each_of_vllms_parsers_is_told_or_listed_as_not() -> None:
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    tools, reasoning = told()
    assert {*ToolParserManager.list_registered()} == tools | NOT_TOLD.keys()
    # What leaves thoughts as they are is no reader of them.
    names = {*ReasoningParserManager.list_registered()} - {"identity"}
    assert names == reasoning | REASONING_NOT_TOLD.keys()
    assert not tools & NOT_TOLD.keys()
    assert not reasoning & REASONING_NOT_TOLD.keys()


def test_one_that_needs_another_package_is_left_out_with_the_reason(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server on Command R7B would not start without Cohere's package."""
    monkeypatch.setitem(sys.modules, "cohere_melody", None)
    monkeypatch.delitem(sys.modules, "vllm.parser.cohere_command", raising=False)
    of_demo = arguments.read_base_chat(str(base_dir))
    template = "{{ tools }}<|START_ACTION|><|START_THINKING|>"
    cohere = replace(of_demo, template=template, model_type="cohere2")
    monkeypatch.setattr(arguments, "read_base_chat", lambda *_, **__: cohere)
    with caplog.at_level(logging.WARNING):
        _, found, _ = arguments.choose_parsers(settings(base_dir))
    assert (found.tools, found.reasoning, found.tools_guessed) == ("hermes", None, True)
    assert "cohere_melody" in caplog.text
    assert "Set TOOL_PARSER" in caplog.text

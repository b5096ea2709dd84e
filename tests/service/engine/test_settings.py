"""The settings name what vLLM has."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args

from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs

from server.settings import ALLOWED_MAX_RANKS, OWNED_ENGINE_ARGS, Settings
from tests.pure.server.test_settings import refusal


def test_owned_arguments_are_arguments_of_the_engine() -> None:
    front_end = {"lora_modules"}
    assert OWNED_ENGINE_ARGS.keys() - front_end <= {field.name for field in fields(AsyncEngineArgs)}
    settings = {name.upper() for name in Settings.model_fields}
    assert {told for told in OWNED_ENGINE_ARGS.values() if told.isupper()} <= settings


def test_ranks_are_those_that_vllm_compiles() -> None:
    assert get_args(MaxLoRARanks) == ALLOWED_MAX_RANKS
    assert refusal(max_lora_rank=24)[0] == "max_lora_rank"

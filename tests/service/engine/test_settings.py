"""The settings name what vLLM has."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from adapters.worker.cpu.executor import YieldingExecutor
from server.engine.arguments import Slots, refuse_what_cannot_run, vllm_arguments
from server.engine_args import ONE_ENGINE_ARGS, OWNED_ENGINE_ARGS, REFUSED_ENGINE_ARGS
from server.settings import ALLOWED_MAX_RANKS, Settings
from tests.pure.server.test_settings import refusal


def test_owned_arguments_are_arguments_of_the_engine() -> None:
    front_end = {"lora_modules"}
    assert OWNED_ENGINE_ARGS.keys() - front_end <= {field.name for field in fields(AsyncEngineArgs)}
    settings = {name.upper() for name in Settings.model_fields}
    assert {told for told in OWNED_ENGINE_ARGS.values() if told.isupper()} <= settings


def test_ranks_are_those_that_vllm_compiles() -> None:
    assert get_args(MaxLoRARanks) == ALLOWED_MAX_RANKS
    assert refusal(max_lora_rank=24)[0] == "max_lora_rank"


def test_refused_arguments_are_arguments_of_vllm() -> None:
    front_end = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    known = {field.name for field in fields(AsyncEngineArgs)} | vars(front_end).keys()
    assert {*REFUSED_ENGINE_ARGS, *ONE_ENGINE_ARGS} <= known


def test_a_mixture_of_experts_is_refused_on_a_cpu() -> None:
    def config(is_moe: bool) -> SimpleNamespace:
        return SimpleNamespace(model_config=SimpleNamespace(is_moe=is_moe))

    refuse_what_cannot_run(config(is_moe=False))
    with pytest.raises(ValueError, match="mixture of experts needs a GPU"):
        refuse_what_cannot_run(config(is_moe=True))


def test_the_executor_is_handed_over_as_a_class(tmp_path: Path) -> None:
    """vLLM asks it what it supports, as it does for pipeline stages; a name supports nothing."""
    settings = Settings(model=str(tmp_path), gpu_slots=1, max_lora_rank=8)
    _, made = vllm_arguments(settings, Slots(1, 4))
    assert made.distributed_executor_backend is YieldingExecutor
    assert made.distributed_executor_backend.supports_pp


def test_traces_of_the_engine_go_where_ours_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    args = vllm_arguments(Settings(model="m", traces_url="http://t:4318/"), Slots(1, 4))[1]
    assert args.otlp_traces_endpoint == "http://t:4318/v1/traces"
    assert vllm_arguments(Settings(model="m"), Slots(1, 4))[1].otlp_traces_endpoint is None

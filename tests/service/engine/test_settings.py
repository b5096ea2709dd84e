"""The settings name what vLLM has."""

from __future__ import annotations

import base64
import io
import json
import os
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from PIL import Image
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.multimodal.media import ImageMediaIO, MediaConnector
from vllm.utils.argparse_utils import FlexibleArgumentParser

from adapters.worker.cpu.executor import YieldingExecutor
from adapters.worker.scheduler import _count_adapters, adapters_of
from server.engine import arguments, bases
from server.engine.arguments import (
    Slots,
    slots_of,
    vllm_arguments,
    want_batch_invariance,
)
from server.engine.errors import from_vllm
from server.engine.sharding import LAYERS
from server.errors import status_of
from server.settings import ALLOWED_MAX_RANKS, Settings
from server.settings.engine_args import ONE_ENGINE_ARGS, OWNED_ENGINE_ARGS, REFUSED_ENGINE_ARGS
from server.settings.engine_args_served import SERVED_ENGINE_ARGS
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
    front_end = arguments.make_arg_parser(FlexibleArgumentParser()).parse_args([])
    known = {field.name for field in fields(AsyncEngineArgs)} | vars(front_end).keys()
    assert {*REFUSED_ENGINE_ARGS, *ONE_ENGINE_ARGS} <= known


# Arguments of vLLM's front end that are handed to what serves requests here too.
PASSED_ON = {
    "anthropic_disabled_thinking_effort",
    "chat_template",
    "chat_template_content_format",
    "cohere_format",
    "cohere_is_reasoning_model",
    "default_chat_template_kwargs",
    "enable_auto_tool_choice",
    "enable_flash_late_interaction",
    "enable_force_include_usage",
    "enable_per_request_metrics",
    "enable_prompt_tokens_details",
    "exclude_tools_when_tool_choice_none",
    "fingerprint_mode",
    "fingerprint_value",
    "log_error_stack",
    "response_role",
    "return_tokens_as_token_ids",
    "tool_call_parser",
    "tool_strict_level",
    "trust_request_mm_kwargs",
}


def test_every_argument_of_the_front_end_is_handed_on_or_refused() -> None:
    """A new one of vLLM's is to be looked at: most do nothing without its own server."""
    front_end = vars(arguments.make_arg_parser(FlexibleArgumentParser()).parse_args([])).keys()
    others = front_end - {field.name for field in fields(AsyncEngineArgs)} - OWNED_ENGINE_ARGS.keys()
    assert others - REFUSED_ENGINE_ARGS.keys() == PASSED_ON | {"api_server_count"}


def test_every_argument_of_the_engine_has_been_looked_at() -> None:
    """A new one of vLLM's is to be entered where it belongs: it may do nothing here, or break isolation."""
    served = [name for names in SERVED_ENGINE_ARGS.values() for name in names]
    owned = [name for name in OWNED_ENGINE_ARGS if name != "lora_modules"]
    engine = {field.name for field in fields(AsyncEngineArgs)}
    refused = [name for name in REFUSED_ENGINE_ARGS if name in engine]
    one = [name for name in ONE_ENGINE_ARGS if name in engine]
    assert sorted([*served, *owned, *refused, *one]) == sorted(engine)


def test_an_argument_that_nobody_has_looked_at_is_handed_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known = {about: tuple(n for n in names if n != "seed") for about, names in SERVED_ENGINE_ARGS.items()}
    monkeypatch.setattr(arguments, "SERVED_ENGINE_ARGS", known)
    assert made_for(tmp_path, LLAMA, {"seed": 3, "dtype": "float32"}).seed == 3
    (warning,) = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert "seed" in warning
    assert "dtype" not in warning


def test_a_second_engine_or_machine_is_refused_by_every_argument() -> None:
    several = ("data_parallel_", "dp_supervisor_", "elastic_", "node_rank", "nnodes", "master_addr")
    named = {field.name for field in fields(AsyncEngineArgs) if field.name.startswith(several)}
    assert named <= REFUSED_ENGINE_ARGS.keys() | set(ONE_ENGINE_ARGS)


def test_the_executor_is_handed_over_as_a_class(tmp_path: Path) -> None:
    """vLLM asks it what it supports, as it does for pipeline stages; a name supports nothing."""
    settings = Settings(model=str(tmp_path), gpu_slots=1, max_lora_rank=8)
    _, made = vllm_arguments(settings, Slots(1, 4))
    assert made.distributed_executor_backend is YieldingExecutor
    assert made.distributed_executor_backend.supports_pp


LLAMA = {"model_type": "llama", "hidden_size": 64}


def made_for(folder: Path, base: Any, engine_args: dict[str, Any], **others: Any) -> Any:
    """vLLM's arguments for a base with this config.json; None: it is not in a folder."""
    if base is not None:
        (folder / "config.json").write_text(json.dumps(base))
    settings = Settings(model=str(folder), engine_args=engine_args, **{"gpu_slots": 2} | others)
    return vllm_arguments(settings, Slots(1, 4))[1]


@pytest.mark.parametrize(
    ("base", "engine_args", "others", "divided"),
    [
        (LLAMA, {"tensor_parallel_size": 2}, {}, True),
        (LLAMA, {"tensor_parallel_size": 2, "fully_sharded_loras": False}, {}, False),
        (LLAMA, {}, {}, False),
        (LLAMA, {"tensor_parallel_size": 2}, {"rank_slots": 4}, False),
        (LLAMA, {"tensor_parallel_size": 16}, {"max_lora_rank": 8}, False),
        (LLAMA | {"hidden_size": 66}, {"tensor_parallel_size": 4}, {}, False),
        (LLAMA, {"tensor_parallel_size": 2, "model_impl": "transformers"}, {}, False),
        ({"model_type": "mixtral", "hidden_size": 64}, {"tensor_parallel_size": 2}, {}, False),
        ({"model_type": "qwen3_next", "hidden_size": 64}, {"tensor_parallel_size": 2}, {}, False),
        (None, {"tensor_parallel_size": 2}, {}, False),
    ],
)
def test_several_workers_keep_one_copy_where_vllm_can_divide_all_layers(
    tmp_path: Path, base: Any, engine_args: dict[str, Any], others: dict[str, Any], divided: bool
) -> None:
    assert made_for(tmp_path, base, engine_args, **others).fully_sharded_loras is divided


def test_two_streams_for_adapters_are_left_on_where_they_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM switches them off where it divides both halves."""
    monkeypatch.setenv("VLLM_LORA_ENABLE_DUAL_STREAM", "1")
    assert made_for(tmp_path, LLAMA, {"tensor_parallel_size": 2}).fully_sharded_loras is False


@pytest.mark.parametrize(
    ("base", "engine_args", "others", "served"),
    [
        (LLAMA, {"tensor_parallel_size": 2}, {}, LAYERS),
        (LLAMA, {}, {"rank_slots": 4}, LAYERS),
        (LLAMA, {}, {}, None),
        (LLAMA, {"tensor_parallel_size": 2, "lora_target_modules": ["o_proj"]}, {}, ["o_proj"]),
        ({"model_type": "mixtral", "hidden_size": 64}, {"tensor_parallel_size": 2}, {}, None),
        (None, {"tensor_parallel_size": 2}, {}, None),
    ],
)
def test_a_slot_has_no_room_for_a_vocabulary_that_is_not_served(
    tmp_path: Path, base: Any, engine_args: dict[str, Any], others: dict[str, Any], served: Any
) -> None:
    made = made_for(tmp_path, base, engine_args, **others).lora_target_modules
    assert made == (None if served is None else list(served))


def test_traces_of_the_engine_go_where_ours_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    settings = Settings(model=str(tmp_path), traces_url="http://t:4318/")
    assert vllm_arguments(settings, Slots(1, 4))[1].otlp_traces_endpoint == "http://t:4318/v1/traces"
    assert vllm_arguments(Settings(model=str(tmp_path)), Slots(1, 4))[1].otlp_traces_endpoint is None


@pytest.mark.parametrize(
    "given", [{}, {"allowed_media_domains": []}, {"allowed_media_domains": ["images.test"]}]
)
@pytest.mark.parametrize(
    "host", ["127.0.0.1:9", "localhost:9", "[::1]:9", "169.254.169.254", "images.test@127.0.0.1:9"]
)
def test_no_customer_has_a_file_of_another_host_fetched(
    tmp_path: Path, given: dict[str, Any], host: str
) -> None:
    made = vllm_arguments(Settings(model=str(tmp_path), engine_args=given), Slots(1, 4))[1]
    connector = MediaConnector(allowed_media_domains=made.allowed_media_domains)
    with pytest.raises(ValueError, match="allowed domains") as refused:
        connector.load_from_url(f"http://{host}/a.png", ImageMediaIO())
    told = from_vllm(str(refused.value), 400, None)
    assert (status_of(told)[0], told.code) == (400, "unsupported_parameter")
    assert "data: URL" in told.message
    assert os.environ["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"


def test_a_picture_in_the_request_is_read(tmp_path: Path) -> None:
    made = vllm_arguments(Settings(model=str(tmp_path)), Slots(1, 4))[1]
    file = io.BytesIO()
    Image.new("RGB", (2, 3)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    connector = MediaConnector(allowed_media_domains=made.allowed_media_domains)
    assert connector.load_from_url(url, ImageMediaIO()).media.size == (2, 3)


def test_adapters_that_share_slots(tmp_path: Path) -> None:
    """vLLM makes GPU_SLOTS slots; its scheduler and its workers hear how many adapters share them."""
    settings = Settings(model=str(tmp_path), gpu_slots=2, host_slots=4, max_lora_rank=64, rank_slots=12)
    slots = slots_of(settings)
    assert (slots.gpu, slots.active, slots.host) == (2, 12, 12)
    _, made = vllm_arguments(settings, slots)
    assert (made.max_loras, made.max_cpu_loras) == (2, 12)
    assert adapters_of(SimpleNamespace(additional_config=made.additional_config)) == 12
    scheduler = SimpleNamespace(vllm_config=made, lora_config=SimpleNamespace(max_loras=2))
    before = scheduler.lora_config
    _count_adapters(scheduler)
    assert (scheduler.lora_config.max_loras, before.max_loras) == (12, 2)
    _, alone = vllm_arguments(settings, Slots(2, 4))
    assert not adapters_of(SimpleNamespace(additional_config=alone.additional_config))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rank_slots": 1}, "RANK_SLOTS .1. must be at least GPU_SLOTS .2."),
        ({"max_lora_rank": 320}, "MAX_LORA_RANK .320. must be a power of two"),
    ],
)
def test_what_cannot_share_slots_is_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    given: dict[str, Any] = {"gpu_slots": 2, "host_slots": 4, "max_lora_rank": 64, "rank_slots": 12} | changes
    with pytest.raises(ValueError, match=why):
        slots_of(Settings(model=str(tmp_path), **given))


def test_a_cpu_has_no_kernels_that_are_the_same_in_any_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    want_batch_invariance(Settings(model=str(tmp_path)))
    with pytest.raises(ValueError, match="BATCH_INVARIANT needs a GPU"):
        want_batch_invariance(Settings(model=str(tmp_path), batch_invariant=True))
    assert "VLLM_BATCH_INVARIANT" not in os.environ


def test_stages_of_a_pipeline_are_refused_on_a_cpu(tmp_path: Path) -> None:
    settings = Settings(model=str(tmp_path), engine_args={"pipeline_parallel_size": 2})
    with pytest.raises(ValueError, match="pipeline_parallel_size needs a GPU"):
        bases.refuse_what_cannot_load(settings)

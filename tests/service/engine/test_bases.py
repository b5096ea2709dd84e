"""Bases that the engine cannot serve are refused before their weights are read, with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from transformers import DeepseekV3Config, LlamaConfig, MixtralConfig, Qwen3Config, Qwen3MoeConfig

from adapters.model import Head
from server.engine import bases, contract
from server.engine.arguments import base_model_of
from server.engine.bases import has_experts, refuse_what_cannot_load, refuse_what_cannot_run
from server.engine.engine import Engine
from server.inference.dialects.registry import DIALECTS
from server.settings import Settings
from tests.support.trainer import SIZES

MIXTURES = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2),
}
EXPERTS = "a mixture of experts, which needs a GPU"


def settings_of(folder: Path, config: Any = None, **engine_args: Any) -> Settings:
    """On a folder that has a config and no weights."""
    folder.mkdir(exist_ok=True)
    if config is not None:
        config.save_pretrained(folder)
    return Settings(model=str(folder), gpu_slots=1, host_slots=1, max_lora_rank=8, engine_args=engine_args)


@pytest.mark.parametrize("kind", MIXTURES)
async def test_a_mixture_of_experts_does_not_start_on_a_cpu(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are no weights to be read; neither are they looked for."""
    monkeypatch.setattr(contract, "check", lambda: None)  # seconds, for what another test looks at
    with pytest.raises(ValueError, match=EXPERTS):
        await Engine.start(settings_of(tmp_path, MIXTURES[kind]), DIALECTS)


@pytest.mark.parametrize(
    ("config", "mixed"),
    [
        (MIXTURES["mixtral"].to_dict(), True),
        (DeepseekV3Config().to_dict(), True),
        ({"text_config": MIXTURES["qwen3-moe"].to_dict(), "vision_config": {}}, True),
        ({"block_configs": [{"block_type": "moe", "n_routed_experts": 8}]}, True),
        (LlamaConfig(**SIZES).to_dict(), False),
        (Qwen3Config(**SIZES).to_dict(), False),
        ({"text_config": LlamaConfig(**SIZES).to_dict()}, False),
        ({"num_experts": 0, "text_config": None, "block_configs": None}, False),
    ],
)
def test_a_config_tells_whether_there_are_experts(config: dict[str, Any], mixed: bool) -> None:
    assert has_experts(config) is mixed


def test_one_that_is_no_folder_is_refused_once_it_is_known() -> None:
    def config(is_moe: bool) -> SimpleNamespace:
        return SimpleNamespace(model_config=SimpleNamespace(is_moe=is_moe, model="org/model"))

    refuse_what_cannot_run(config(is_moe=False))
    with pytest.raises(ValueError, match=f"org/model is {EXPERTS}"):
        refuse_what_cannot_run(config(is_moe=True))


def test_what_is_to_classify_has_a_head(tmp_path: Path) -> None:
    text = LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"])
    with pytest.raises(ValueError, match="no head to classify with"):
        refuse_what_cannot_load(settings_of(tmp_path, text, runner="pooling", convert="classify"))
    made = {"classifier_from_token": ["no", "yes"], "method": "no_post_processing"}
    args = {"runner": "pooling", "convert": "classify"}
    refuse_what_cannot_load(settings_of(tmp_path, text, **args, hf_overrides=made))
    refuse_what_cannot_load(settings_of(tmp_path, text))
    headed = LlamaConfig(**SIZES, architectures=["LlamaForSequenceClassification"])
    refuse_what_cannot_load(settings_of(tmp_path, headed, **args))


def test_the_config_is_the_one_that_the_engine_reads(tmp_path: Path) -> None:
    """Which ENGINE_ARGS may name, and change."""
    mixed, dense = MIXTURES["qwen3-moe"], LlamaConfig(**SIZES)
    none = {"num_experts": 0, "num_local_experts": 0}  # the same by two names
    settings_of(tmp_path / "mixed", mixed)
    settings_of(tmp_path / "dense", dense)
    refuse_what_cannot_load(settings_of(tmp_path / "mixed", hf_config_path=str(tmp_path / "dense")))
    with pytest.raises(ValueError, match=EXPERTS):
        refuse_what_cannot_load(settings_of(tmp_path / "dense", hf_config_path=str(tmp_path / "mixed")))
    refuse_what_cannot_load(settings_of(tmp_path / "mixed", hf_overrides=none))
    with pytest.raises(ValueError, match=EXPERTS):
        refuse_what_cannot_load(settings_of(tmp_path / "mixed", hf_overrides={"rope_theta": 10.0}))

    around = json.dumps({"text_config": mixed.to_dict()})
    (tmp_path / "around").mkdir()
    (tmp_path / "around" / "config.json").write_text(around)
    refuse_what_cannot_load(settings_of(tmp_path / "around", hf_overrides={"text_config": none}))
    with pytest.raises(ValueError, match=EXPERTS):
        refuse_what_cannot_load(
            settings_of(tmp_path / "around", hf_overrides={"text_config": {"rope_theta": 10.0}})
        )


def test_a_config_that_is_none_is_said_to_be(tmp_path: Path) -> None:
    for text, words in ((json.dumps([]), "is no JSON object"), ("{", "is no JSON: ")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            refuse_what_cannot_load(settings_of(tmp_path))


@pytest.mark.parametrize(
    ("config", "engine_args", "rank_slots", "says"),
    [
        (LlamaConfig(**SIZES).to_dict(), {"tensor_parallel_size": 2}, 0, "one worker, and ENGINE_ARGS ask"),
        (LlamaConfig(**SIZES).to_dict(), {}, 8, "share slots"),
        (LlamaConfig(**SIZES).to_dict(), {"fully_sharded_loras": True}, 0, "fully_sharded_loras"),
        (LlamaConfig(**SIZES).to_dict(), {"fully_sharded_loras": False}, 0, None),
        (LlamaConfig(**SIZES).to_dict(), {"quantization": "fp8"}, 0, "quantized"),
        (LlamaConfig(**SIZES).to_dict(), {"quantization_config": {"linear": "fp8"}}, 0, "quantized"),
        (
            LlamaConfig(**SIZES).to_dict() | {"quantization_config": {"quant_method": "fp8"}},
            {},
            0,
            "quantized",
        ),
        (MIXTURES["qwen3-moe"].to_dict(), {}, 0, "experts of a mixture"),
        (LlamaConfig(**SIZES).to_dict(), {}, 0, None),
    ],
)
def test_dora_on_a_gpu_is_refused_where_it_cannot_be_computed(
    config: dict[str, Any], engine_args: dict[str, Any], rank_slots: int, says: str | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = Settings(model=str(tmp_path), dora_on_gpu=True, rank_slots=rank_slots, engine_args=engine_args)
    if says is None:
        refuse_what_cannot_load(settings)
        return
    with pytest.raises(ValueError, match=rf"DORA_ON_GPU: .*{says}.* merged"):
        refuse_what_cannot_load(settings)


def in_the_cache(name: str, config: Any, folder: Path) -> None:
    """As the hub's library keeps what it has fetched."""
    of_model = folder / f"models--{name.replace('/', '--')}"
    (of_model / "refs").mkdir(parents=True)
    (of_model / "refs" / "main").write_text("0" * 40)
    config.save_pretrained(of_model / "snapshots" / ("0" * 40))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_base_of_the_hub_is_refused_before_it_is_loaded(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_cache("org/mixed", MIXTURES["qwen3-moe"], hub)
    in_the_cache("org/dense", LlamaConfig(**SIZES), hub)
    with pytest.raises(ValueError, match=f"org/mixed is {EXPERTS}"):
        refuse_what_cannot_load(Settings(model="org/mixed"))
    monkeypatch.setattr(bases.current_platform, "is_cpu", lambda: False)
    refuse_what_cannot_load(Settings(model="org/mixed"))
    with pytest.raises(ValueError, match="DORA_ON_GPU: the experts of a mixture are not scaled"):
        refuse_what_cannot_load(Settings(model="org/mixed", dora_on_gpu=True))
    refuse_what_cannot_load(Settings(model="org/dense", dora_on_gpu=True))
    for unknown in ("org/not-there", str(tmp_path / "not-there")):
        refuse_what_cannot_load(Settings(model=unknown, dora_on_gpu=True))


@pytest.mark.parametrize(
    ("changes", "says"), [({"rank_slots": 8}, "RANK_SLOTS"), ({"dora_on_gpu": True}, "DORA_ON_GPU")]
)
def test_what_stages_of_a_pipeline_do_not_serve_ends_the_start(
    changes: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, where stages run. Heads and DoRAs of adapters are refused there at the upload."""
    monkeypatch.setattr(bases.current_platform, "is_cpu", lambda: False)
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    stages = {"pipeline_parallel_size": 2}
    refuse_what_cannot_load(Settings(model=str(tmp_path), engine_args=stages))
    with pytest.raises(ValueError, match=f"^{says}: "):
        refuse_what_cannot_load(Settings(model=str(tmp_path), engine_args=stages, **changes))


def test_adapters_on_stages_of_a_pipeline_bring_no_head_dora_or_vocabulary() -> None:
    """As on any two workers: each describes its own layers, and the base's head is on the last."""
    described = [
        {"modules": {f"model.layers.{at}.mlp.up_proj": [8, 8]}, "aliases": {}, "fused": {}, "dora": True,
         "head": head, "vocabulary": {"lm_head": [8, 32]}, "max_lora_rank": 8}
        for at, head in enumerate((None, ["score", 8, 2, 64]))
    ]  # fmt: skip
    base = base_model_of("m", described)
    assert len(base.modules) == 2
    assert base.head == Head("score", 8, 2, 0)
    assert not base.dora
    assert not base.vocabulary
    alone = base_model_of("m", described[1:])
    assert alone.dora
    assert alone.head == Head("score", 8, 2, 64)

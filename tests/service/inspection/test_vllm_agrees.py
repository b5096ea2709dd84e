"""What is accepted means the same to vLLM and PEFT as to the inspection."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from adapters.errors import AdapterRejected
from adapters.inspection import peft_config
from adapters.inspection.inspect import inspect
from adapters.inspection.peft_config import PeftConfig, read_config
from adapters.model import CONFIG_FILE, BaseModel
from tests.pure.adapters.test_any_bytes import FUZZ, json_values
from tests.pure.adapters.test_inspect import accepted
from tests.support.peft_adapters import K1, Config, base, good, make_llama, read, write

__all__ = ["accepted", "base", "good"]


@pytest.fixture(scope="module")
def vllm_reads(base: BaseModel) -> Callable[[Path], Any]:
    """vLLM's own reading of a folder's config, with its refusals. A fixture, because the import is slow."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    def reads(folder: Path) -> Any:
        helper = PEFTHelper.from_local_dir(str(folder), max_position_embeddings=None)
        helper.validate_legal(LoRAConfig(max_lora_rank=base.max_lora_rank))
        return helper

    return reads


def test_vllm_and_peft_read_an_accepted_adapter_as_we_do(
    accepted: Path, base: BaseModel, vllm_reads: Callable[[Path], Any]
) -> None:
    from vllm.lora.utils import parse_fine_tuned_lora_name

    manifest = inspect(accepted, base)
    config = read_config(accepted / CONFIG_FILE, base)
    helper = vllm_reads(accepted)
    names = {parse_fine_tuned_lora_name(name)[0] for name in read(accepted)[1]}
    assert names == set(manifest.modules)
    peft = PeftModel.from_pretrained(make_llama(), accepted).base_model.model
    for module in names:
        ours = (config.rank_of(module), config.scaling_of(module))
        layer = peft.get_submodule(module)
        assert ours == helper.get_rank_and_scaling(module) == (layer.r["default"], layer.scaling["default"])


@pytest.mark.parametrize("init", ["Gaussian", "EVA", "lora_GA"])
def test_initialisations_are_told_apart_as_vllm_does_it(
    init: str, good: Path, base: BaseModel, tmp_path: Path, vllm_reads: Callable[[Path], Any]
) -> None:
    config, tensors = read(good)
    config["init_lora_weights"] = init
    folder = write(tmp_path, config, tensors)
    assert inspect(folder, base).modules
    assert vllm_reads(folder).init_lora_weights == init


@FUZZ
@given(
    fields=st.dictionaries(
        st.sampled_from(sorted(PeftConfig.model_fields.keys() | peft_config.REFUSED.keys())),
        json_values,
        max_size=2,
    ),
    patterns=st.dictionaries(
        st.sampled_from(["q_proj", "k_proj", "self_attn.k_proj", K1, "v.proj", "q.proj", "layers.0"]),
        st.sampled_from([2, 4, 4.0, 8]),
        max_size=3,
    ),
    pattern=st.sampled_from(["rank_pattern", "alpha_pattern"]),
)
def test_vllm_takes_whatever_is_accepted(
    fields: Config,
    patterns: Config,
    pattern: str,
    good: Path,
    base: BaseModel,
    tmp_path: Path,
    vllm_reads: Callable[[Path], Any],
) -> None:
    path = tmp_path / CONFIG_FILE
    config = json.loads((good / CONFIG_FILE).read_text()) | fields | {pattern: patterns}
    path.write_text(json.dumps(config))
    try:
        ours = read_config(path, base)
    except AdapterRejected:
        return
    helper = vllm_reads(tmp_path)
    for module in base.modules:
        assert helper.get_rank_and_scaling(module) == (ours.rank_of(module), ours.scaling_of(module))

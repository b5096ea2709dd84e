"""A GPU's wrappers of kernels, where there is no GPU: with the kernels written out in torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vllm import _custom_ops
from vllm.config.lora import LoRAConfig
from vllm.distributed import parallel_state

from adapters.worker.dora_gpu import DoraRowsOnGPU
from tests.service.worker import test_dora_gpu as dora
from tests.service.worker.test_shared_slots import ONE_WORKER
from tests.support import experts_in_triton as experts
from tests.support import kernels_in_torch


@pytest.fixture(autouse=True)
def in_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kernels_in_torch.install(monkeypatch)
    monkeypatch.setattr(parallel_state, "_TP", ONE_WORKER)
    aligns = "moe_lora_align_block_size"  # which ``experts`` replaces
    monkeypatch.setattr(_custom_ops, aligns, getattr(_custom_ops, aligns, None), raising=False)
    with dora.vllms_layers_as_before():
        yield


def test_a_dora_on_a_gpu_answers_as_peft_does() -> None:
    config = LoRAConfig(
        max_loras=dora.SLOTS, max_lora_rank=dora.RANK, max_cpu_loras=dora.SLOTS, lora_dtype=torch.float32
    )
    with torch.inference_mode():
        wrapper = DoraRowsOnGPU(dora.TOKENS, dora.TOKENS, "cpu", lora_config=config)
        assert max(dora.differences(wrapper, torch.float32)) < 1e-5


def test_shared_slots_on_a_gpu_answer_as_slots_for_each_do() -> None:
    from tests.support import shared_in_triton

    with torch.inference_mode():
        assert max(shared_in_triton.differences(2)) < 5e-3, "float16, about one"


@pytest.mark.parametrize("kind", experts.SHAPES)
def test_experts_of_adapters_answer_as_pefts_do(kind: str, tmp_path: Path) -> None:
    assert experts.difference(experts.SHAPES[kind], tmp_path) < experts.TOLERANCE

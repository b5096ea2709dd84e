"""What ``interpreted`` runs of DoRA: a GPU's wrapper of kernels and vLLM's layers, against PEFT in float32.

Imported where vLLM has found Triton, and nowhere else.
"""

from __future__ import annotations

import torch
from vllm.config.lora import LoRAConfig
from vllm.distributed import parallel_state
from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op

from adapters.worker.dora_gpu import DoraRowsOnGPU
from tests.service.worker.test_dora_gpu import RANK, SLOTS, TOKENS, differences
from tests.service.worker.test_shared_slots import ONE_WORKER
from tests.support.shared_in_triton import launched_whole

lora_shrink_op.get_lora_op_configs = lora_expand_op.get_lora_op_configs = launched_whole

# Outputs reach ten, and float16 has eleven bits of them.
TOLERANCE = 2e-2


def largest_difference() -> float:
    """In float16, of two DoRAs, a LoRA and no adapter in one batch, and of a LoRA that follows a DoRA."""
    parallel_state._TP = ONE_WORKER  # type: ignore[assignment]
    config = LoRAConfig(max_loras=SLOTS, max_lora_rank=RANK, max_cpu_loras=SLOTS, lora_dtype=torch.float16)
    with torch.inference_mode():
        return max(differences(DoraRowsOnGPU(TOKENS, TOKENS, "cpu", lora_config=config), torch.float16))

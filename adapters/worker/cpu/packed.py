"""Layers of a quantized base whose weight is packed away.

vLLM asks a layer's weight on which device its adapters are to lie. The kernel for weights of eight bits keeps
none (``weight`` is None once it has its own copy), and the start ends there. On a CPU there is one answer.
"""

from __future__ import annotations

from typing import Any

import torch


def know_the_device() -> None:
    """From now on vLLM puts adapters into the memory of the CPU without asking, in this process."""
    from vllm.lora.layers import base_linear
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        base_linear._get_lora_device = _cpu


def _cpu(_: Any) -> torch.device:
    return torch.device("cpu")

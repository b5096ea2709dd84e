"""The same on a GPU: vLLM asks the platform for its wrapper of kernels, before CUDA graphs are captured.

Not run on a GPU yet. An engine that serves DoRA has another wrapper (``dora_gpu``), and shares no slots.
"""

from __future__ import annotations

from typing import Any

from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from adapters.worker.dora_gpu import DoraRowsOnGPU
from adapters.worker.ranges import Range
from adapters.worker.scheduler import adapters_of, serves_dora
from adapters.worker.shared_slots import SharedRows


class SharedRowsOnGPU(SharedRows, PunicaWrapperGPU):  # type: ignore[misc]  # vLLM is not typed for us
    """Shares from the beginning: what a graph has captured is what runs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from vllm.config import get_current_vllm_config

        super().__init__(*args, **kwargs)
        adapters = adapters_of(get_current_vllm_config())
        config = kwargs["lora_config"]
        self.share(adapters, config.max_lora_rank)
        for slot in range(min(adapters, config.max_loras)):
            # vLLM tries its kernels with whole slots before anything is paged.
            self.settle(slot, Range(slot, 0, config.max_lora_rank))


def _named(wrapper: type) -> str:
    return f"{wrapper.__module__}.{wrapper.__qualname__}"


def offer() -> None:
    """Makes it the wrapper of an engine that shares slots, in this process, and another one that of an engine
    that serves DoRA; elsewhere vLLM's own stays.
    """
    from vllm.config import get_current_vllm_config
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike():
        return
    usual = current_platform.get_punica_wrapper

    def chosen() -> str:
        config = get_current_vllm_config()
        if adapters_of(config):
            return _named(SharedRowsOnGPU)
        if serves_dora(config):
            return _named(DoraRowsOnGPU)
        return str(usual())

    current_platform.get_punica_wrapper = chosen

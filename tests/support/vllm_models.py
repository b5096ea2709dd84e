"""vLLM's own model of a folder in this process, with room for adapters and our kernels, and no engine.

One forward pass needs attention's caches and so an engine; a layer does not. What this shows costs half a
second where an engine costs twenty.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

SLOTS = 2


@contextmanager
def loaded(folder: Path, dtype: str, room: Path, *, rank: int = 8, **options: Any) -> Iterator[Any]:
    """vLLM's LoRAModelManager of the model in ``folder``; ``room`` is empty. Raises what vLLM does.

    ``options`` are more of its LoRAConfig."""
    from vllm.config import set_current_vllm_config
    from vllm.config.lora import LoRAConfig
    from vllm.distributed.parallel_state import (
        destroy_distributed_environment,
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.model_manager import LRUCacheLoRAModelManager
    from vllm.model_executor.model_loader import get_model

    from adapters.worker.cpu.kernels import install
    from adapters.worker.cpu.packed import know_the_device

    config = EngineArgs(
        model=str(folder), dtype=dtype, enforce_eager=True, max_model_len=64, skip_tokenizer_init=True
    ).create_engine_config()
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(config):
        # As vLLM's worker on a CPU does it, which has no accelerator to ask.
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)
        patch.setattr(torch.accelerator, "synchronize", lambda: None)
        from vllm.lora.layers import base_linear

        patch.setattr(base_linear, "_get_lora_device", base_linear._get_lora_device)
        init_distributed_environment(1, 0, f"file://{room / 'rendezvous'}", 0, "gloo")
        try:
            ensure_model_parallel_initialized(1, 1)
            know_the_device()
            model = get_model(vllm_config=config)
            lora = LoRAConfig(
                max_lora_rank=rank,
                max_loras=SLOTS,
                max_cpu_loras=SLOTS,
                lora_dtype=torch.float32,
                **options,
            )
            tables = LRUCacheLoRAModelManager(
                model, 8, 64, config.model_config.get_vocab_size(), lora, torch.device("cpu"), config
            )
            install(tables)
            yield tables
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


def activate(tables: Any, folder: Path, *, number: int = 1) -> None:
    """Loads the adapter in ``folder`` and puts it into a slot, as the worker does."""
    tables.add_adapter(read(tables, folder, number))
    tables.activate_adapter(number)


def read(tables: Any, folder: Path, number: int) -> Any:
    """The adapter in ``folder``, as vLLM's LoRAModel."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    mapper = getattr(tables.model, "hf_to_vllm_mapper", None)
    helper = PEFTHelper.from_local_dir(str(folder), None)
    expected = set(tables.supported_lora_modules)
    for whole, parts in tables.packed_modules_mapping.items():
        if whole in expected:
            expected |= set(parts)
    return LoRAModel.from_local_checkpoint(
        str(folder),
        expected,
        helper,
        lora_model_id=number,
        device="cpu",
        dtype=torch.float32,
        weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
    )


def schedule(tables: Any, tokens: list[int]) -> None:
    """The rows of the next products belong to these adapters, 0 for none."""
    from vllm.lora.layers import LoRAMapping

    tables.set_adapter_mapping(LoRAMapping(tuple(tokens), tuple(tokens), is_prefill=True))

"""What several workers, or adapters that share slots, change in how vLLM makes room for adapters.

vLLM divides one half of each pair among workers by itself; the other it divides with ``fully_sharded_loras``
only, which then takes one copy of an adapter for all workers together, in slots and in host memory, as S-LoRA
does (https://arxiv.org/abs/2311.03285). And it makes room for pairs on the vocabulary, which nobody is served
there, unless it is told the layers (``lora_target_modules``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# ``model_type`` of bases that vLLM builds of layers which it can divide in full. Of others some layers may be
# left without an adapter then, as columns merged out of three parts are, and experts take no rank that the
# number of workers does not divide.
DIVIDED = frozenset(
    (
        "cohere",
        "cohere2",
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "phi3",
        "qwen2",
        "qwen3",
    )
)


# Their layers, as vLLM names them, beside the vocabulary's.
LAYERS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def divides_in_full(base: Mapping[str, Any] | None, given: Mapping[str, Any], *, rank: int) -> bool:
    """Whether ``fully_sharded_loras`` suits ``base``, a config.json, with ``given`` arguments of the engine.

    ``rank``: the largest that is served. False for one worker, where nothing is known of the base, and where
    the workers cannot divide its width or ``rank``.
    """
    workers = given.get("tensor_parallel_size")
    if not isinstance(workers, int) or workers < 2 or base is None:
        return False
    width = base.get("hidden_size")
    return (
        base.get("model_type") in DIVIDED
        and given.get("model_impl", "auto") in ("auto", "vllm")
        and isinstance(width, int)
        and width % workers == 0
        and rank % workers == 0
    )


def layers_served(
    base: Mapping[str, Any] | None, given: Mapping[str, Any], *, shared: bool
) -> list[str] | None:
    """``lora_target_modules`` for ``base``, where pairs on its vocabulary are not served; else None.

    They are served where one worker has a slot for each adapter. ``shared``: several share one.
    """
    workers = given.get("tensor_parallel_size", 1)
    if base is None or not (shared or (isinstance(workers, int) and workers > 1)):
        return None
    known = base.get("model_type") in DIVIDED and given.get("model_impl", "auto") in ("auto", "vllm")
    return list(LAYERS) if known else None

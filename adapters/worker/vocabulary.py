"""The head and the embedding in vLLM's tables: what adapters on them look like."""

from __future__ import annotations

from typing import Any


def vocabulary_shape(layer: Any) -> list[int] | None:
    """[inputs, outputs] of the head or the embedding that vLLM's ``layer`` adapts; None for another layer."""
    from vllm.lora.layers import LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA

    if isinstance(layer, LogitsProcessorWithLoRA):
        return [int(layer.hidden_size), int(layer.base_layer.vocab_size)]
    if isinstance(layer, VocabParallelEmbeddingWithLoRA):
        return [int(layer.base_layer.org_vocab_size), int(layer.base_layer.embedding_dim)]
    return None

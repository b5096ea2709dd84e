"""oneDNN's kernels, made at the start instead of inside engine steps.

vLLM's linear layers are products by oneDNN on a CPU. For every shape of weights and every number of rows
that it has not met, oneDNN makes a kernel, which takes 1 ms and 0.3 MB, and it keeps the last so many of the
process. So each step with a new number of tokens would take some milliseconds longer, in every stream that
is part of it, and memory would grow for hours, by 40 MB in the first quarter of an hour with 16 clients.

    CAPACITY          how many it keeps, in the environment; its own default is 1,024
    make_kernels      one row, two rows and so on, until there are as many as it keeps
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
KERNELS = 512  # 150 MB: steps of up to a hundred tokens, where a model has four or five shapes of weights
LONGEST_S = 10.0  # for large models: what is not made by then is made when it is needed

# Called with a number of rows.
Product = Callable[[int], None]


def make_kernels(model: torch.nn.Module, tokens: int, sequences: int) -> tuple[int, int]:
    """Makes those of ``model``'s layers, for as many rows as there can be in a step.

    ``tokens``: the most in a step; ``sequences``: of how many of them at most the next token is wanted.
    Returns how many kernels there are now and for how many rows, 0 where vLLM runs no such products. To be
    called on the thread that runs the steps: a kernel is for as many threads as its caller has.
    """
    products = list(_products(model, tokens, sequences))
    capacity = int(os.environ.get(CAPACITY, KERNELS))
    until = time.monotonic() + LONGEST_S
    made = rows = 0
    with torch.inference_mode():
        while due := [run for run, most in products if rows < most]:
            if made + len(due) > capacity or time.monotonic() > until:
                break
            rows += 1
            for run in due:
                run(rows)
            made += len(due)
    return made, rows


def _products(model: torch.nn.Module, tokens: int, sequences: int) -> Iterator[tuple[Product, int]]:
    """For each shape of weights one layer's product with so many rows, and the most rows that it gets."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    found = set()
    for layer in model.modules():
        if not hasattr(layer, "cpu_linear"):
            continue
        if isinstance(layer, LinearBase):
            # Of this worker; vLLM has thrown the weights themselves away.
            inputs = getattr(layer, "input_size_per_partition", layer.input_size)
            outputs = getattr(layer, "output_size_per_partition", layer.output_size)
            most, dtype = tokens, layer.params_dtype
        elif isinstance(layer, VocabParallelEmbedding):  # as the language-model head
            outputs, inputs = layer.weight.shape
            most, dtype = sequences, layer.weight.dtype
        else:
            continue
        bias = None if getattr(layer, "skip_bias_add", False) else getattr(layer, "bias", None)
        kind = (inputs, outputs, dtype, bias is None)
        if kind not in found:
            found.add(kind)
            yield _product(layer, inputs, dtype, bias), most


def _product(layer: Any, inputs: int, dtype: torch.dtype, bias: torch.Tensor | None) -> Product:
    def run(rows: int) -> None:
        layer.cpu_linear(torch.zeros((rows, inputs), dtype=dtype), layer.weight, bias)

    return run

"""``python -m tests.support.onednn_memory FILE``: what steps of new sizes add to a process.

Prints as JSON the bytes that some added, the kernels that were then made ahead and for how many rows, and the
bytes that others added after that.
``FILE``: where the processes of one model find each other; this is the only one.
"""

from __future__ import annotations

import ctypes
import json
import sys

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from adapters.worker.cpu import onednn
from adapters.worker.cpu.onednn import make_kernels

SHAPES = 3
TOKENS, SEQUENCES = 24, 8


class Allocated(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated() -> int:
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Allocated
    now = libc.mallinfo2()
    return int(now.uordblks + now.hblkhd)


class Model(torch.nn.Module):
    """Two blocks of ``SHAPES`` shapes, with what differs between vLLM's linear layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for _ in range(2):
            self.layers.append(ColumnParallelLinear(64, 192, bias=True, return_bias=False))
            self.layers.append(RowParallelLinear(192, 64, bias=False, return_bias=False))
            self.layers.append(ReplicatedLinear(64, 96, bias=False, return_bias=False))
        self.lm_head = ParallelLMHead(512, 64)

    def step(self, rows: int) -> None:
        for layer in self.layers:
            layer(torch.zeros(rows, layer.input_size))
        if rows <= SEQUENCES:
            self.lm_head.quant_method.apply(self.lm_head, torch.zeros(rows, 64))


def main(file: str) -> None:
    torch.set_num_threads(1)
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        init_distributed_environment(1, 0, f"file://{file}", 0, "gloo")
        initialize_model_parallel()
        model = Model()
        for layer in (*model.layers, model.lm_head):
            layer.quant_method.process_weights_after_loading(layer)
        for rows in (1, TOKENS + 1):
            model.step(rows)
        unprepared = _grown(model, range(2, SEQUENCES))
        onednn.LONGEST_S = 3600.0  # on a machine that is busy it takes long
        made, rows = make_kernels(model, TOKENS, SEQUENCES)
        prepared = _grown(model, range(SEQUENCES, TOKENS + 1))
        print(json.dumps({"made": made, "rows": rows, "unprepared": unprepared, "prepared": prepared}))


def _grown(model: Model, steps: range) -> int:
    before = allocated()
    for rows in steps:
        model.step(rows)
    return allocated() - before


if __name__ == "__main__":
    main(sys.argv[1])

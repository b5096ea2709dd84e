"""How many adapters fit into a number of bytes: arithmetic over the base model's layers, and nothing else.

vLLM keeps two tensors per layer and slot, padded to ``max_lora_rank`` R: A, R rows of the layer's inputs, and
B, R columns of its outputs (``create_lora_weights`` in ``vllm/lora/layers``). With tensor parallelism over W
workers, each of them holds

    a layer split by column    A whole        B 1/W of the outputs      fully sharded: A 1/W of the rank
    a layer split by row       A 1/W          B whole                   fully sharded: B 1/W of the outputs
    a layer that is not split  A whole        B whole                   the same

In host memory every worker keeps the same parts of an adapter, of its own rank, which is R at the most
(``adapters.worker.shards``); or all of it, where HOST_SHARDS is off.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Split = Literal["column", "row", "none"]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer that a slot has room for, whole, in the checkpoint's terms.

    ``unit``: outputs that stay together when it is split by column, such as those of a KV head, which is
    repeated where there are more workers than heads. ``served``: adapters on it are accepted; a slot pays for
    the vocabulary of many models although they are not. ``cut``: workers keep their part of it in host
    memory; of experts each keeps the whole. ``scaled``: DoRA is served on it, where it is served at all.
    """

    inputs: int
    outputs: int
    split: Split = "none"
    unit: int = 1
    served: bool = True
    cut: bool = True
    scaled: bool = True


@dataclass(frozen=True, slots=True)
class EngineCapacity:
    """What an engine has room for. ``slot_bytes`` count on each worker, ``entry_bytes`` (at most) on all.

    Where ``gpu_slots`` adapters share fewer slots by their ranks, ``shared_slots`` is how many there are, and
    ``slot_ranks`` the ranks of all of them; else both are 0.
    """

    gpu_slots: int
    host_slots: int
    slot_bytes: int
    entry_bytes: int
    shared_slots: int = 0
    slot_ranks: int = 0

    def describe(self, gpu_memory: int, host_memory: int) -> str:
        """One line for the operator; ``gpu_memory`` and ``host_memory`` are what the settings allow."""
        slots = self.shared_slots or self.gpu_slots
        share = f" They are shared by up to {self.gpu_slots} adapters." if self.shared_slots else ""
        return (
            f"a GPU slot takes {in_units(self.slot_bytes)} on each worker: {slots} slots,"
            f" {in_units(slots * self.slot_bytes)}; {gpu_memory // self.slot_bytes} fit in"
            f" adapter_gpu_memory, {in_units(gpu_memory)}.{share}"
            f" A host entry takes up to {in_units(self.entry_bytes)}: {self.host_slots} entries,"
            f" {in_units(self.host_slots * self.entry_bytes)};"
            f" {host_memory // max(1, self.entry_bytes)} fit in adapter_host_memory, {in_units(host_memory)}."
        )


def slot_bytes(
    layers: Iterable[Layer], *, rank: int, itemsize: int, workers: int = 1, fully_sharded: bool = False
) -> int:
    """Bytes of one slot on one of ``workers``. ValueError if they cannot share the layers evenly."""
    elements = 0
    for layer in layers:
        a_rank, inputs, outputs = rank, layer.inputs, layer.outputs
        if layer.split == "column":
            outputs = _part(outputs, workers, layer.unit)
            a_rank = _part(rank, workers) if fully_sharded else rank
        elif layer.split == "row":
            inputs = _part(inputs, workers)
            outputs = _part(outputs, workers) if fully_sharded else outputs
        elements += a_rank * inputs + outputs * rank
    return elements * itemsize


def entry_bytes(
    layers: Iterable[Layer],
    *,
    rank: int,
    itemsize: int,
    workers: int = 1,
    fully_sharded: bool = False,
    shards: bool = True,
) -> int:
    """Bytes that an adapter of ``rank`` on every served layer takes in the memory of all workers."""
    served = [layer for layer in layers if layer.served]
    cut = [layer for layer in served if layer.cut and shards]
    whole = [layer for layer in served if not (layer.cut and shards)]
    parts = slot_bytes(cut, rank=rank, itemsize=itemsize, workers=workers, fully_sharded=fully_sharded)
    return workers * (parts + slot_bytes(whole, rank=rank, itemsize=itemsize))


def dora_bytes(layers: Iterable[Layer]) -> int:
    """Bytes of a slot for DoRA's scales, in float32, where one worker on a GPU serves it."""
    return sum(4 * layer.outputs for layer in layers if layer.scaled)


def head_bytes(labels: int, features: int, *, itemsize: int, bias_itemsize: int) -> int:
    """Bytes of a classifier's whole head, with its bias, in a slot or in host memory; not of pairs on it."""
    return labels * (features * itemsize + bias_itemsize)


def gpu_slots(memory: int, slot: int, most_running: int) -> int:
    """Slots of ``slot`` bytes in ``memory``, at least one.

    No more than the sequences that run at once: each is on one adapter, and what is idle waits in host
    memory, milliseconds away. (A larger slot table also costs every step, in vLLM's kernels.)
    """
    return max(1, min(memory // slot, most_running))


def host_slots(memory: int, entry: int, slots: int) -> int:
    """Entries of ``entry`` bytes in ``memory``; at least ``slots``, as what is in a slot has an entry too."""
    return max(slots, memory // entry)


def in_units(size: int) -> str:
    """``size`` bytes with three digits: "1.46 GiB"."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}"


def _part(size: int, workers: int, unit: int = 1) -> int:
    """One worker's part of ``size``; where there are more workers than units, each has one of them."""
    units = size // unit
    if units % workers and workers % units:
        raise ValueError(f"{workers} workers cannot share {units} evenly")
    return max(1, units // workers) * unit

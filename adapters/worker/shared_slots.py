"""Adapters that share slots of vLLM's stacked tensors, each on ranks of its own (``adapters.worker.ranges``).

vLLM knows one adapter in a slot, and multiplies a token by all ranks of it: x times A, for every rank, then
times B. Here several lie in it side by side; what a token gets from the ranks of the others is set to zero
between the two products, which leaves exactly its own adapter:

    SharedRows       beside one of vLLM's wrappers of kernels: which slot, and which of its ranks, a row has
    SharedSlots      in place of vLLM's table of slots: writes adapters into their ranges, moves them;
                     a slice at a time by ``adapters.worker.shared_filling``

So ``max_loras`` counts slots for the memory, and another number, larger, counts the adapters that run at the
same time: ``lora_index_to_id`` has a place for each of those here, and the scheduler is told that number
(``adapters.worker.scheduler``). Layers of the vocabulary and of experts are not shared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from adapters.worker.cpu.kernels import GroupedPunicaWrapper, install
from adapters.worker.ranges import Put, Range, RankRanges, width_of

NOWHERE = Range(-1, 0, 0)


class SharedRows:
    """To be mixed into a ``PunicaWrapperBase`` in front of it. Before ``share`` it changes nothing."""

    # Of vLLM's wrapper: the slot of each row.
    _token_lora_indices: torch.Tensor
    _bounds: torch.Tensor | None = None

    def share(self, adapters: int, rank: int) -> None:
        """From now on ``lora_index_to_id`` has a place for so many adapters, in slots of ``rank`` ranks."""
        device = self._token_lora_indices.device
        tokens = len(self._token_lora_indices)
        # Of each place its slot and its first and last rank; at the end those of no adapter, index -1.
        self._bounds = torch.tensor([[-1, 0, 0]] * (adapters + 1), dtype=torch.long, device=device)
        self._ranks = torch.arange(rank, device=device)
        # Of each row the ranks that are not its adapter's. Kept in place: a CUDA graph reads it there.
        self._foreign = torch.zeros((tokens, rank), dtype=torch.bool, device=device)

    def settle(self, index: int, place: Range) -> None:
        """The adapter at ``index`` is in ``place``; rows follow with the next ``update_metadata``."""
        assert self._bounds is not None
        self._bounds[index] = torch.tensor([place.slot, place.start, place.stop])

    def _update_base_metadata(
        self, mapping: Any, lora_index_to_id: Any, max_loras: int, vocab_size: int
    ) -> None:
        super()._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)  # type: ignore[misc]
        if self._bounds is None:
            return
        tokens, samples, _, embeddings = self.indices_len  # type: ignore[attr-defined]
        rows = self._token_lora_indices[:tokens]
        found = self._bounds[rows]
        slots, first, stop = found[:, 0], found[:, 1:2], found[:, 2:3]
        rows.copy_(slots)
        torch.logical_or(self._ranks < first, self._ranks >= stop, out=self._foreign[:tokens])
        sampled = self._sampler_indices[:samples]  # type: ignore[attr-defined]
        sampled.copy_(self._bounds[sampled][:, 0])
        # Nothing is ever written into the tables of the vocabulary; any row of theirs is zero.
        self._embeddings_indices[:embeddings].zero_()  # type: ignore[attr-defined]

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """As vLLM's GPU wrapper has it, for the others too: shrink, then expand."""
        if self._bounds is None:
            super().add_lora_linear(  # type: ignore[misc]
                y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs
            )
            return
        kwargs.pop("buffer", None)
        add_inputs = kwargs.pop("add_inputs", True)
        shape = len(output_slices), x.view(-1, x.shape[-1]).shape[0], lora_b_stacked[0].shape[-1]
        buffer = torch.zeros(shape, dtype=torch.float32, device=x.device)
        self.add_shrink(buffer, x, lora_a_stacked, scale, **kwargs)  # type: ignore[attr-defined]
        self.add_expand(y, buffer, lora_b_stacked, output_slices, add_inputs=add_inputs, **kwargs)

    def add_expand(
        self,
        y: torch.Tensor,
        x: Any,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """``x`` (slices, rows, ranks) loses what belongs to other adapters first.

        It is filled with zeros, not multiplied by them: what a neighbour makes of a row may be infinite.
        """
        if self._bounds is not None:
            for part in x:
                part.masked_fill_(self._foreign[: part.shape[0]], 0)
        super().add_expand(  # type: ignore[misc]
            y, x, lora_b_stacked, output_slices, offset_start, add_inputs, **kwargs
        )


class SharedRowsOnCPU(SharedRows, GroupedPunicaWrapper):
    """On a CPU, where it proves that answers are the same; it saves no memory there."""


def share_slots(tables: Any, adapters: int) -> SharedSlots:
    """Lets so many adapters share the slots of ``tables``. ValueError where they cannot."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        wrappers: list[Any] = list(install(tables, SharedRowsOnCPU))
    else:  # there since before CUDA graphs were captured; see ``shared_rows_gpu``
        wrappers = list({id(one): one for one in tables.punica_wrapper_mapping.values()}.values())
    if len(wrappers) != 1 or not isinstance(wrappers[0], SharedRows):
        raise ValueError("RANK_SLOTS: this model's kernels cannot share slots")
    return SharedSlots(tables, wrappers[0], adapters)


class SharedSlots:
    """Replaces ``activate_adapter`` and ``_deactivate_adapter`` of vLLM's ``tables`` (LoRAModelManager).

    ``adapters``: how many may be active at the same time. ValueError for what cannot share slots.
    """

    def __init__(self, tables: Any, wrapper: SharedRows, adapters: int) -> None:
        from vllm.lora.model_manager import AdapterLRUCache

        config = tables.lora_config
        self._tables = tables
        self._wrapper = wrapper
        self._layers = _shared_layers(tables)
        if config.fully_sharded_loras and any(layer.tp_size > 1 for layer in self._layers.values()):
            raise ValueError(
                "RANK_SLOTS: ranges of ranks cannot be divided among workers, too (fully_sharded_loras)"
            )
        self.ranges = RankRanges(tables.lora_slots, config.max_lora_rank)
        wrapper.share(adapters, config.max_lora_rank)
        tables.lora_config = copy.copy(config)
        tables.lora_config.max_loras = adapters  # which ``lora_slots`` is from now on
        tables.lora_index_to_id = [None] * adapters
        tables._active_adapters = AdapterLRUCache(adapters, self.give_back)
        tables._deactivate_adapter = self.give_back
        tables.activate_adapter = self.activate
        tables._last_mapping = None

    def ranks_of(self, lora: Any) -> int:
        """The ranks that ``lora`` (LoRAModel) takes of a slot."""
        ranks = [
            side.shape[1]
            for name in self._layers
            if (weights := self._tables._get_lora_layer_weights(lora, name))
            for side in (weights.lora_b if isinstance(weights.lora_b, list) else [weights.lora_b])
            if side is not None
        ]
        return width_of(max(ranks, default=1))

    def activate(self, load_id: int) -> bool:
        """As ``activate_adapter``: what is active stays so, though its range may be another afterwards.

        ValueError where no room is left, or a weight is not finite or of another shape than its layer's.
        """
        if load_id in self._tables._active_adapters:
            return False
        effects = self.take(load_id)
        try:
            for effect in effects:
                for _ in self.write(effect):
                    pass
                self.settle(effect)
        except BaseException:
            self.give_back(load_id)
            raise
        return True

    def take(self, load_id: int) -> list[Put]:
        """A place for a load that is registered: what is to be written for it, in order, itself last.

        LookupError where so many are active already, ValueError where its ranks are not free.
        """
        table = self._tables.lora_index_to_id
        if None not in table:
            raise LookupError("no slot is free")
        effects = self.ranges.add(load_id, self.ranks_of(self._tables._registered_adapters[load_id]))
        table[table.index(None)] = load_id
        return effects

    def give_back(self, load_id: int) -> None:
        """The place of a load, active or not yet. Its weights stay, and no token uses them."""
        self.ranges.remove(load_id)
        if load_id in self._tables.lora_index_to_id:
            index = self._tables.lora_index_to_id.index(load_id)
            self._tables.lora_index_to_id[index] = None
            self._wrapper.settle(index, NOWHERE)

    def write(self, effect: Put) -> Iterator[None]:
        """Writes one layer after the other. ValueError for a weight that may not be there."""
        lora = self._tables._registered_adapters[effect.load]
        for name, layer in self._layers.items():
            self._write_layer(lora, name, layer, effect.place)
            yield

    def settle(self, effect: Put) -> None:
        """All of it is written: from the next step on its tokens use it."""
        tables = self._tables
        self._wrapper.settle(tables.lora_index_to_id.index(effect.load), effect.place)
        tables._active_adapters[effect.load] = None
        tables._last_mapping = None  # rows of adapters that were there already may have other ranks

    def remove(self, load_id: int) -> None:
        """From vLLM's tables, and so from host memory."""
        self._tables.remove_adapter(load_id)

    def _write_layer(self, lora: Any, name: str, layer: Any, place: Range) -> None:
        weights = self._tables._get_lora_layer_weights(lora, name)
        a, b = (weights.lora_a, weights.lora_b) if weights else ([None] * layer.n_slices,) * 2
        if weights and layer.tp_size > 1:
            a, b = layer.slice_lora_a(a), layer.slice_lora_b(b)
        a, b = (side if isinstance(side, list) else [side] for side in (a, b))
        if not len(a) == len(b) == layer.n_slices:
            raise ValueError(f"RANK_SLOTS: {name} has {layer.n_slices} parts, and the adapter {len(a)}")
        stacked = zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
        for (slot_a, slot_b), part_a, part_b in zip(stacked, a, b, strict=True):
            _fill(slot_a[place.slot, 0, place.start : place.stop], part_a, name)
            _fill(
                slot_b[place.slot, 0, :, place.start : place.stop].T,
                None if part_b is None else part_b.T,
                name,
            )


def _fill(rows: torch.Tensor, weights: torch.Tensor | None, name: str) -> None:
    """The ranks of ``rows`` become those of ``weights``, and zero where it has no more.

    A weight that is not finite would reach the neighbours: nothing times infinity is not zero.
    """
    count = 0 if weights is None else len(weights)
    if weights is not None and count:
        if count > len(rows) or weights.shape[1:] != rows.shape[1:]:
            raise ValueError(f"{name}: {tuple(weights.shape)} does not fit into {tuple(rows.shape)}")
        if not torch.isfinite(weights).all():
            raise ValueError(f"{name} has weights that are not finite; it cannot share a slot")
        rows[:count].copy_(weights, non_blocking=True)
    rows[count:].zero_()


def _shared_layers(tables: Any) -> dict[str, Any]:
    from vllm.lora.layers import FusedMoEWithLoRA
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    if any(isinstance(layer, FusedMoEWithLoRA) for layer in tables.modules.values()):
        raise ValueError("RANK_SLOTS: the experts of a mixture cannot share slots")
    return {n: layer for n, layer in tables.modules.items() if isinstance(layer, BaseLinearLayerWithLoRA)}

"""DoRA on a GPU: after vLLM's two products each layer's output is multiplied by one vector for each adapter.

    y + (d - 1) * (y - bias)        for each row, by the adapter of its token

    rows        vLLM's wrapper of kernels, which the platform's hook chooses; it has the slot of each row
    tables      beside the slots of each linear layer, d - 1 in float32, (slots + 1, outputs): zero for a slot
                whose adapter is no DoRA, and for rows without an adapter, whose index is -1, the last
    outputs     of vLLM's layers for adapters, by plain operations of torch, so that they are compiled and
                captured with the rest

The tables are there before anything is captured, so that an engine has them or not from its start on
(DORA_ON_GPU): the operations cost every step, whatever its adapters. Where a row's factor is one nothing is
added to it, and it keeps its bits. One worker; no quantized base, as the scale needs the weights themselves;
no ``fully_sharded_loras``, whose layers add both products by calls of their own.

Not run on a GPU yet. vLLM's layers and kernels have been run with this in Triton's interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.lora.layers import MergedColumnParallelLinearWithLoRA, ReplicatedLinearWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from adapters.worker.dora import DoraScales, Scales

# Of vLLM's layers: those methods that end in ``_apply_lora_to_output``, which is what scales.
_SCALED = (
    BaseLinearLayerWithLoRA.apply,
    MergedColumnParallelLinearWithLoRA.apply,
    ReplicatedLinearWithLoRA.apply,
)


class DoraRows:
    """To be mixed into a ``PunicaWrapperBase``: its layers have tables, and scale their outputs."""

    # Of vLLM's wrapper: the slot of each row, -1 for none.
    _token_lora_indices: torch.Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        scale_outputs()

    def scaled(self, y: torch.Tensor, table: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``y`` (rows, outputs) of the last ``update_metadata``, in its own dtype; computed in float32."""
        extra = table[self._token_lora_indices[: y.shape[0]]]
        whole = y.float()
        return torch.addcmul(whole, extra, whole if bias is None else whole - bias).to(y.dtype)


class DoraRowsOnGPU(DoraRows, PunicaWrapperGPU):  # type: ignore[misc]  # vLLM is not typed for us
    """What the platform names as the wrapper of an engine that serves DoRA."""


def scale_outputs() -> None:
    """From now on vLLM's linear layers do so, in this process, where ``DoraRows`` is their wrapper."""
    if hasattr(BaseLinearLayerWithLoRA, "loraplex_extra"):
        return
    BaseLinearLayerWithLoRA.loraplex_extra = BaseLinearLayerWithLoRA.loraplex_bias = None
    add_lora = BaseLinearLayerWithLoRA._apply_lora_to_output
    connect: Callable[[Any, Any], None] = BaseLinearLayerWithLoRA.set_mapping

    @functools.wraps(add_lora)
    def add_and_scale(layer: Any, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        output = add_lora(layer, x, output)
        if layer.loraplex_extra is None:
            return output
        flat = output.reshape(-1, output.shape[-1])
        found = layer.punica_wrapper.scaled(flat, layer.loraplex_extra, layer.loraplex_bias)
        return torch.reshape(found, output.shape)

    @functools.wraps(connect)
    def connect_and_make_room(layer: Any, wrapper: Any) -> None:
        connect(layer, wrapper)
        # A classifier's head has an output of its own, which no DoRA is served on.
        scaled = type(layer)._apply_lora_to_output is add_and_scale and type(layer).apply in _SCALED
        if isinstance(wrapper, DoraRows) and scaled:
            slots, outputs = len(layer.lora_b_stacked[0]), sum(layer.output_slices)
            device = layer.lora_b_stacked[0].device
            # By default the model's dtype is that of new tensors while vLLM makes it.
            layer.loraplex_extra = torch.zeros(slots + 1, outputs, dtype=torch.float32, device=device)
            bias = None if layer.base_layer.skip_bias_add else layer.base_layer.bias
            layer.loraplex_bias = None if bias is None else bias.detach().float()

    BaseLinearLayerWithLoRA._apply_lora_to_output = add_and_scale
    BaseLinearLayerWithLoRA.set_mapping = connect_and_make_room


def tables_bytes(layer: Any) -> int:
    """Bytes of a slot's part of the tables beside ``layer``, of vLLM's layers; 0 where it has none."""
    extra = getattr(layer, "loraplex_extra", None)
    return 0 if extra is None else int(extra[0].nbytes)


class DoraTables(DoraScales):
    """``tables`` is vLLM's ``LRUCacheLoRAModelManager``, whose layers ``DoraRows`` serves.

    ``quantization`` is that of the base, None where its weights are as they were trained; else ValueError.
    """

    def __init__(self, tables: Any, quantization: str | None) -> None:
        if quantization is not None:
            raise ValueError(
                "DORA_ON_GPU: the scale of a DoRA is computed from weights that are not quantized, and those"
                f" of MODEL are ({quantization}). Switch it off, or serve such adapters merged."
            )
        super().__init__(tables)
        self._layers = {
            name: layer
            for name, layer in tables.modules.items()
            if getattr(layer, "loraplex_extra", None) is not None
        }
        self._in_use: set[int] = set()
        extras = [layer.loraplex_extra for layer in self._layers.values()]
        self._on_device = extras[0].device if extras else torch.device("cpu")
        self._columns = sum(extra.shape[1] for extra in extras)
        self._room()  # the first one is made by the driver, the later ones are the same memory

    def _room(self) -> torch.Tensor:
        """For the numbers of a slot, pinned where there is a device; lent anew once it has been copied."""
        return torch.empty(self._columns, pin_memory=self._on_device.type != "cpu")

    def fill(self, slot: int, scales: Scales) -> None:
        """As there. One copy to the device, and a short one within it for each layer, behind the steps.

        It waits for none of them: a copy from memory that is not pinned would hold the engine until all the
        steps in flight have ended.
        """
        places, factors = [], []
        for name, layer in self._layers.items() if scales else ():
            for first, d in self._of_layer(name, layer, scales):
                places.append(layer.loraplex_extra[slot, first : first + len(d)])
                factors.append(d - 1)
        if len(places) != len(scales):
            raise ValueError(f"{len(scales) - len(places)} of {len(scales)} DoRA scales fit no layer")
        if slot in self._in_use:
            for layer in self._layers.values():
                layer.loraplex_extra[slot].zero_()
            self._in_use.discard(slot)
        if places:
            room = self._room()[: sum(len(one) for one in factors)]
            torch.cat(factors, out=room)
            whole = room.to(self._on_device, non_blocking=True)
            for place, part in zip(places, torch.split(whole, [len(one) for one in factors]), strict=True):
                place.copy_(part)
            self._in_use.add(slot)


def serves(tables: Any) -> bool:
    """Whether ``tables`` (LoRAModelManager) were made by an engine that serves DoRA."""
    return any(getattr(layer, "loraplex_extra", None) is not None for layer in tables.modules.values())

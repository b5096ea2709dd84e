"""The head's adapters where log-probabilities of prompts are asked for.

vLLM applies the head to the rows that are sampled, one a request, and tells the kernels of LoRA the adapter
of each. For the log-probabilities of a prompt it applies the head once more, to all rows of the prompt, and
the kernels still go by the other list: the first row is multiplied by the head of the batch's first request,
the second by that of its second, and those after them by none. So a customer's prompt gets other customers'
heads. Here the kernels are told the adapters of the prompt's own rows for that time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from adapters.worker.cpu.kernels import GroupedPunicaWrapper


class PromptHeads:
    """Stands between vLLM's ``runner``, of either version, and its model. Uses of it ``model.compute_logits``
    and ``_get_prompt_logprobs_dict``, or those of ``prompt_logprobs_worker`` that begin with ``compute_``.

    ``tables``: vLLM's ``LRUCacheLoRAModelManager``. Changes nothing where adapters leave the head alone.
    """

    def __init__(self, runner: Any, tables: Any) -> None:
        from vllm.lora.layers import LogitsProcessorWithLoRA

        heads = [layer for layer in tables.modules.values() if isinstance(layer, LogitsProcessorWithLoRA)]
        self._wrappers = list({id(head.punica_wrapper): head.punica_wrapper for head in heads}.values())
        self._states: torch.Tensor | None = None
        if not self._wrappers:
            return
        self._compute = runner.model.compute_logits
        runner.model.compute_logits = self._compute_logits
        if (worker := getattr(runner, "prompt_logprobs_worker", None)) is not None:
            for name in ("compute_prompt_logprobs", "compute_prompt_token_id_logprobs"):
                setattr(worker, name, self._during(getattr(worker, name), at=1))
        elif hasattr(runner, "_get_prompt_logprobs_dict"):
            runner._get_prompt_logprobs_dict = self._during(runner._get_prompt_logprobs_dict, at=0)

    def _during(self, compute: Callable[..., Any], at: int) -> Callable[..., Any]:
        """``compute``, whose argument ``at`` is the step's hidden states (tokens, hidden)."""

        def computed(*args: Any) -> Any:
            self._states = args[at]
            try:
                return compute(*args)
            finally:
                self._states = None

        return computed

    def _compute_logits(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._states is None:
            return self._compute(hidden_states, *args, **kwargs)
        first = first_row(hidden_states, self._states)
        with self._told(first, first + len(hidden_states)):
            return self._compute(hidden_states, *args, **kwargs)

    @contextmanager
    def _told(self, first: int, last: int) -> Iterator[None]:
        """The kernels go by the adapters of the step's tokens from ``first`` to before ``last``."""
        for wrapper in self._wrappers:
            tell(wrapper, wrapper.token_lora_indices[first:last])
        try:
            yield
        finally:
            for wrapper in self._wrappers:
                tell(wrapper, wrapper.sampler_indices)


def tell(wrapper: Any, slots: torch.Tensor) -> None:
    """``slots`` (rows,): the slot of each row that the head is applied to, -1 for none."""
    if isinstance(wrapper, GroupedPunicaWrapper):
        wrapper.sample(slots)
    else:  # PunicaWrapperGPU
        wrapper.prompt_mapping_meta.prepare_tensors(slots)


def first_row(part: torch.Tensor, whole: torch.Tensor) -> int:
    """Which row of ``whole`` (rows, columns) is the first of ``part``, a slice of it."""
    return (part.data_ptr() - whole.data_ptr()) // (whole.stride(0) * whole.element_size())

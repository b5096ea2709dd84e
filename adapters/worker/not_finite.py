"""Keeps what is not a number inside the step that made it.

An adapter can be finite and still overflow on some inputs. Its keys and values in the KV cache are then NaN
or infinite, and they outlive it: a freed block is given to another request, and attention multiplies the
positions that this one has not written yet by zero, which leaves NaN. From then on everybody's answers are
empty.

Where steps are scheduled one after the other, as on a CPU, the worker looks at every step's logits, which a
NaN in the request's keys or values reaches. Where it finds one it replaces what is not finite in the blocks
of that request before the step ends, which is before the scheduler can free one of them. A model that pools
(embeddings, labels, scores) has no logits: there it looks at the hidden states that are pooled.

Where the next step is scheduled before this one has ended, as on a GPU, that would be too late. There every
block is zeroed as it is given to a request, before it is read, by what vLLM has for models that need it
always (``KVBlockZeroer``): one launch in a step that allocates blocks. ``PoliteScheduler`` asks for it.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from vllm.platforms import current_platform

logger = logging.getLogger(__name__)

# Requests whose NaN is remembered; each is reported with its next output, so a few are enough.
REMEMBERED = 4096
# Bytes that are looked at in one go, so that the copy that ``isfinite`` makes stays small.
PIECE_BYTES = 64 << 20


def zeroes_new_blocks() -> bool:
    """Whether blocks are zeroed as they are given out: the scheduler's process and the workers' ask alike."""
    return not current_platform.is_cpu()


class NotFiniteGuard:
    """Watches the logits of vLLM's ``runner`` (GPUModelRunner or its CPU kind), or the hidden states where it
    pools them, and cleans its KV cache.

    Uses of it ``_get_nans_in_logits``, which vLLM calls once a step where ``VLLM_COMPUTE_NANS_IN_LOGITS`` is
    set, ``_pool``, which it calls once a step where the model pools, ``use_async_scheduling``, ``kv_caches``,
    ``kv_cache_config``, ``requests`` with their ``block_ids``, ``input_batch`` and ``_init_kv_zero_meta``.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._reported: OrderedDict[str, int] = OrderedDict()
        self.in_step = hasattr(runner, "_get_nans_in_logits") and not runner.use_async_scheduling
        if self.in_step:
            self._count = runner._get_nans_in_logits
            runner._get_nans_in_logits = self._count_and_scrub
        if self.in_step and hasattr(runner, "_pool"):
            self._pool = runner._pool
            runner._pool = self._scrub_and_pool

    def zero_new_blocks(self) -> None:
        """From now on the runner zeroes the blocks that the scheduler names, also of models for which vLLM
        would not. Before the first request."""
        if zeroes_new_blocks():
            self._runner._init_kv_zero_meta()

    def _count_and_scrub(self, logits: Any) -> dict[str, int]:
        """vLLM's count by request id; cleans the cache where it is not zero.

        A request keeps its count: of a prompt in pieces only the last one has an output to report it.
        """
        if not self._reported and (logits is None or not torch.isnan(logits.sum())):
            return {}  # one pass instead of vLLM's three
        counts: dict[str, int] = self._count(logits)
        self._found(counts)
        if self._reported:
            counts |= {request: self._reported[request] for request in counts if request in self._reported}
        return counts

    def _scrub_and_pool(
        self, hidden_states: torch.Tensor, scheduled: int, by_request: Iterable[int], *args: Any
    ) -> Any:
        """vLLM's pooling of ``hidden_states`` (tokens, hidden), of which ``scheduled`` are requests' tokens,
        as many as ``by_request`` says of each; cleans the cache of those with something that is not finite.

        All that such a request has in the step becomes NaN, and so does its answer, by which the front end
        knows it: also that of a prompt in pieces, whose last one sees a cache that was cleaned.
        """
        requests = self._runner.input_batch.req_ids
        states = hidden_states[:scheduled]
        known = not self._reported.keys().isdisjoint(requests)
        if known or not torch.isfinite(states.sum(dtype=torch.float32)):
            parts = dict(
                zip(requests, torch.split(states, [int(count) for count in by_request]), strict=True)
            )
            self._found(
                {request: int(part.numel() - torch.isfinite(part).sum()) for request, part in parts.items()}
            )
            for request in self._reported.keys() & parts.keys():
                parts[request].fill_(torch.nan)
        return self._pool(hidden_states, scheduled, by_request, *args)

    def _found(self, counts: dict[str, int]) -> None:
        """Remembers ``counts``, by request, of what was not finite where something was not, and cleans what
        these requests wrote."""
        found = {request: count for request, count in counts.items() if count}
        if not found:
            return
        self._reported.update(found)
        while len(self._reported) > REMEMBERED:
            self._reported.popitem(last=False)
        self.scrub(self._blocks(found))

    def _blocks(self, requests: Iterable[str]) -> set[int] | None:
        """The blocks of ``requests``; None if one is not known."""
        states = [self._runner.requests.get(request) for request in requests]
        if None in states:
            return None
        return set(chain.from_iterable(ids for state in states for ids in state.block_ids))

    def scrub(self, blocks: Collection[int] | None = None) -> int:
        """Sets to zero what is not finite in ``blocks`` of the KV cache, in all of it if they are not given.

        Returns how many numbers that were.
        """
        started = time.perf_counter()
        count = self._runner.kv_cache_config.num_blocks
        cleaned = 0
        for cache in _tensors(self._runner.kv_caches):
            if blocks is None or cache.shape[0] % count:
                cleaned += sum(_scrub(piece) for piece in _pieces(cache))
            else:
                cleaned += _scrub_blocks(cache, blocks, cache.shape[0] // count)
        logger.warning(
            "cleaned %d numbers of the KV cache that were not finite, in %.0f ms",
            cleaned,
            1000 * (time.perf_counter() - started),
        )
        return cleaned


def _tensors(caches: Any) -> Iterator[torch.Tensor]:
    """The tensors of ``caches``, which some models nest in lists, that hold floating-point numbers."""
    for cache in caches:
        if isinstance(cache, torch.Tensor):
            if cache.is_floating_point():
                yield cache
        elif isinstance(cache, Iterable):
            yield from _tensors(cache)


def _pieces(cache: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of ``cache`` of about ``PIECE_BYTES`` each, along its longest axis."""
    axis = max(range(cache.dim()), key=lambda i: cache.shape[i])
    rows = max(1, cache.shape[axis] * PIECE_BYTES // max(1, cache.nbytes))
    for start in range(0, cache.shape[axis], rows):
        yield cache.narrow(axis, start, min(rows, cache.shape[axis] - start))


def _scrub_blocks(cache: torch.Tensor, blocks: Collection[int], parts: int) -> int:
    """As ``_scrub``, of ``blocks``. A block of the scheduler's is ``parts`` rows of ``cache``."""
    rows = [block * parts + part for block in sorted(blocks) for part in range(parts)]
    return sum(_scrub(cache[row]) for row in rows)


def _scrub(piece: torch.Tensor) -> int:
    """Sets to zero what is not finite in ``piece``; returns how many numbers that were."""
    if piece.element_size() == 1:  # float8 has no arithmetic; its NaN is looked for in a wider type
        bad = ~torch.isfinite(piece.to(torch.float16))
    elif torch.isfinite(piece.sum(dtype=torch.float32)):
        return 0
    else:
        bad = ~torch.isfinite(piece)
    count = int(bad.sum())
    if count:
        piece.masked_fill_(bad, 0)
    return count

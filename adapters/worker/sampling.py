"""What vLLM's first runner lets the other requests of a step change in one's answer.

Where one request asks for the log-probabilities of tokens that it names, vLLM gives all requests of the step
only as many columns as that one has, and fills those of the others with token 0 and minus infinity. Here
each gets what it asked for.

A request with a seed draws from a generator of its own, once a step; also in a step that reads a piece of its
prompt only, whose token is thrown away. vLLM then sets the generator back, which a CPU's cannot: it raises in
the step, and the engine ends for everybody. How a prompt is cut into pieces depends on who else is in the
step. Here such a row draws from the step's own numbers, as those without a seed do.

A thinking budget is kept by the row of the batch. Where a request without one moves to the row of one that
has ended, vLLM leaves the budget there, and the answer of the one without is made to end a thought that it
does not have. Here a budget goes with its request.

vLLM's second runner has none of these faults.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch


class FairSampling:
    """Stands between vLLM's ``runner`` (GPUModelRunner or its CPU kind) and its sampler. Uses of it
    ``sampler`` with ``gather_specific_token_logprobs`` and ``gather_logprobs``, ``sample_tokens``,
    ``device``, ``discard_request_mask``, and ``input_batch`` with ``max_num_logprobs``, ``generators`` and
    ``thinking_budget_state_holder``.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        sampler: Any = getattr(runner, "sampler", None)
        if hasattr(sampler, "gather_specific_token_logprobs"):
            self._gather = sampler.gather_specific_token_logprobs
            sampler.gather_specific_token_logprobs = self._gather_for_all
        if hasattr(runner, "discard_request_mask") and runner.device.type == "cpu":
            self._sample = runner.sample_tokens
            runner.sample_tokens = self._sample_without_pieces
        budgets = getattr(getattr(runner, "input_batch", None), "thinking_budget_state_holder", None)
        if budgets is not None:
            self._budgets = budgets
            self._sync = budgets.sync_batch
            budgets.sync_batch = self._sync_budgets

    def _gather_for_all(
        self, logprobs: torch.Tensor, named: dict[int, list[int]], sampled: torch.Tensor
    ) -> Any:
        """Of ``logprobs`` (rows, vocabulary), for each row, its ``sampled`` token, and then those that are
        ``named`` for it, or else the most likely ones; as wide as the widest, of -inf where there is none.
        """
        own = self._gather(logprobs, named, sampled)
        most = self._runner.input_batch.max_num_logprobs
        if own is None or most is None:
            return own
        best = self._runner.sampler.gather_logprobs(logprobs, most, token_ids=sampled)
        rows = torch.zeros(len(logprobs), 1, dtype=torch.bool)
        rows[list(named)] = True
        rows = rows.to(logprobs.device)
        width = max(own.logprobs.shape[1], best.logprobs.shape[1])
        return own._replace(
            logprob_token_ids=torch.where(
                rows, _widened(own.logprob_token_ids, width, 0), _widened(best.logprob_token_ids, width, 0)
            ),
            logprobs=torch.where(
                rows, _widened(own.logprobs, width, -torch.inf), _widened(best.logprobs, width, -torch.inf)
            ),
        )

    def _sample_without_pieces(self, *args: Any) -> Any:
        """Generators of requests whose prompt goes on after this step are not there meanwhile."""
        batch = self._runner.input_batch
        pieces = np.nonzero(self._runner.discard_request_mask.np[: batch.num_reqs])[0].tolist()
        kept = {row: batch.generators.pop(row) for row in pieces if row in batch.generators}
        try:
            return self._sample(*args)
        finally:
            batch.generators.update(kept)

    def _sync_budgets(self, update: Any) -> None:
        """By vLLM's BatchUpdate: who has left the batch, who has come, and then who has moved."""
        if not update:
            return
        self._sync(replace(update, moved=[]))
        state = self._budgets._state
        for one, other, direction in update.moved:
            first, second = state.pop(one, None), state.pop(other, None)
            if first is not None:
                state[other] = first
            if second is not None and direction.name == "SWAP":
                state[one] = second


def _widened(of: torch.Tensor, width: int, filler: float) -> torch.Tensor:
    """``of`` (rows, columns) with columns of ``filler`` behind them, ``width`` in all."""
    return torch.nn.functional.pad(of, (0, width - of.shape[1]), value=filler)

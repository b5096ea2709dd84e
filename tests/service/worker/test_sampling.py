"""What a request of vLLM's first runner is told beside others in its step: what it would be told alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from adapters.worker.sampling import FairSampling

VOCABULARY = 64
LOGITS = torch.randn((4, VOCABULARY), generator=torch.Generator().manual_seed(11))
# Row -> the tokens that it names, or how many of the most likely ones it wants.
NAMED = {1: [7, 3], 3: [9, 8, 60, 2]}
WANTED = {0: 5, 2: 1}
SEED = 3


def metadata(named: dict[int, list[int]], most: int | None, rows: int) -> Any:
    """vLLM's, of requests that want the most likely token."""
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    none = torch.empty(0)
    return SamplingMetadata(
        temperature=None, all_greedy=True, all_random=False, top_p=None, top_k=None, generators={},
        max_num_logprobs=most, logprob_token_ids=named or None, prompt_token_ids=None,
        frequency_penalties=none, presence_penalties=none, repetition_penalties=none, no_penalties=True,
        output_token_ids=[[] for _ in range(rows)], spec_token_ids=None, allowed_token_ids_mask=None,
        bad_words_token_ids={}, logitsprocs=LogitsProcessors(),
    )  # fmt: skip


def told(rows: list[int]) -> dict[int, dict[int, float]]:
    """By row of LOGITS, what vLLM's front end reads of a step with these: token -> log-probability."""
    from vllm.v1.sample.sampler import Sampler

    named = {place: NAMED[row] for place, row in enumerate(rows) if row in NAMED}
    most = max((WANTED[row] for row in rows if row in WANTED), default=None)
    runner = SimpleNamespace(sampler=Sampler(), input_batch=SimpleNamespace(max_num_logprobs=most))
    FairSampling(runner)
    out = runner.sampler(LOGITS[rows].clone(), metadata(named, most, len(rows))).logprobs_tensors
    found = {}
    for place, row in enumerate(rows):
        count = 1 + (len(NAMED[row]) if row in NAMED else WANTED[row])
        ids, values = out.logprob_token_ids[place, :count], out.logprobs[place, :count]
        found[row] = dict(zip(ids.tolist(), values.tolist(), strict=True))
    return found


@pytest.mark.parametrize("rows", [[0, 1], [1, 2], [3, 2, 0, 1], [0, 2], [1, 3]])
def test_each_gets_the_log_probabilities_that_it_asked_for(rows: list[int]) -> None:
    together = told(rows)
    for row in rows:
        expected = torch.log_softmax(LOGITS[row], -1)
        tokens = {int(expected.argmax()), *NAMED.get(row, expected.topk(WANTED.get(row, 1)).indices.tolist())}
        assert together[row] == pytest.approx({token: float(expected[token]) for token in tokens}, abs=1e-5)
        assert together[row] == told([row])[row]


def test_no_number_is_drawn_for_a_piece_of_a_prompt() -> None:
    def state(draws: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(SEED)
        for _ in range(draws):
            torch.randint(9, (1,), generator=generator)
        return generator.get_state()

    def sample_tokens(grammar: Any) -> str:
        for generator in batch.generators.values():
            torch.randint(9, (1,), generator=generator)
        if grammar is not None:
            raise ValueError(grammar)
        return "sampled"

    generators = {row: torch.Generator().manual_seed(SEED) for row in (0, 2)}
    batch = SimpleNamespace(num_reqs=3, generators=dict(generators))
    mask = SimpleNamespace(np=np.array([True, True, False, True]))  # the last is of a row that is not there
    runner = SimpleNamespace(
        input_batch=batch,
        discard_request_mask=mask,
        device=torch.device("cpu"),
        sample_tokens=sample_tokens,
    )
    FairSampling(runner)
    assert runner.sample_tokens(None) == "sampled"
    with pytest.raises(ValueError, match="broken"):
        runner.sample_tokens("broken")
    assert batch.generators == generators
    assert torch.equal(generators[0].get_state(), state(draws=0))
    assert torch.equal(generators[2].get_state(), state(draws=2))


def test_a_thinking_budget_goes_with_its_request() -> None:
    from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
    from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

    config = SimpleNamespace(reasoning_start_token_ids=[1], reasoning_end_token_ids=[2])
    holder = ThinkingBudgetStateHolder(config, 8, 0, torch.device("cpu"), is_pin_memory=False)
    FairSampling(SimpleNamespace(input_batch=SimpleNamespace(thinking_budget_state_holder=holder)))

    def added(row: int, budget: int | None) -> tuple[int, Any, list[int], list[int]]:
        return row, SimpleNamespace(thinking_token_budget=budget), [1], []

    def budgets() -> dict[int, int]:
        return {row: one["thinking_token_budget"] for row, one in holder._state.items()}

    def sync(**what: Any) -> dict[int, int]:
        holder.sync_batch(BatchUpdate(batch_size=4, **{"removed": [], "added": [], "moved": [], **what}))
        return budgets()

    there = [added(0, 5), added(1, None), added(2, 7), added(3, None)]
    assert sync(added=there) == {0: 5, 2: 7}
    assert sync(moved=[(3, 0, MoveDirectionality.UNIDIRECTIONAL)]) == {2: 7}  # what was in row 0 has ended
    assert sync(moved=[(2, 1, MoveDirectionality.SWAP)]) == {1: 7}
    assert sync(moved=[(1, 2, MoveDirectionality.UNIDIRECTIONAL)]) == {2: 7}
    assert sync(removed=[2]) == {}
    holder.sync_batch(None)
    assert budgets() == {}

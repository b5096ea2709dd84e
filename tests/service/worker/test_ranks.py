"""Counting for log-probabilities without a compiler, against what vLLM has compiled for it."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.sample import sampler
from vllm.v1.sample.ops import logprobs

from adapters.worker.cpu import ranks


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_it_counts_as_vllm_does(rows: int) -> None:
    x = torch.randn(rows, 1000, generator=torch.Generator().manual_seed(rows)).round(decimals=1)
    x[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    plain = logprobs.batched_count_greater_than._torchdynamo_orig_callable
    for column in range(5):
        values = x[:, column : column + 1]
        counted = ranks.count_as_great(x, values)
        assert counted.dtype == torch.int64
        assert counted.tolist() == plain(x, values).tolist()


def test_vllms_sampler_compiles_nothing_for_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: object) -> None:
        raise AssertionError("it would have been compiled")

    monkeypatch.setattr(sampler, "batched_count_greater_than", compiled)
    x = torch.log_softmax(torch.randn(3, 50), dim=-1)
    with pytest.raises(AssertionError):
        sampler.Sampler.gather_logprobs(x, 2, torch.tensor([0, 1, 2]))
    ranks.install()
    found = sampler.Sampler.gather_logprobs(x, 2, torch.tensor([0, 1, 2]))
    assert found.selected_token_ranks.tolist() == [int((x[i] >= x[i, i]).sum()) for i in range(3)]

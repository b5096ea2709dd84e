"""The guard of the KV cache below the engine: whose blocks it cleans, and in which layouts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapters.worker import not_finite
from adapters.worker.not_finite import NotFiniteGuard

BLOCKS = 6
NAN, INF = float("nan"), float("inf")


def runner(*caches: torch.Tensor, **requests: tuple[list[int], ...]) -> Any:
    """A model runner in mid-step; ``requests`` have the blocks of each group."""
    return SimpleNamespace(
        use_async_scheduling=False,
        kv_caches=list(caches),
        kv_cache_config=SimpleNamespace(num_blocks=BLOCKS),
        requests={name: SimpleNamespace(block_ids=ids) for name, ids in requests.items()},
        _get_nans_in_logits=lambda logits: dict(
            zip(requests, torch.isnan(logits).sum(dim=1).tolist(), strict=True)
        ),
        zeroed=[],
        _init_kv_zero_meta=lambda: None,
        input_batch=SimpleNamespace(req_ids=list(requests)),
        _pool=lambda states, scheduled, by_request, connector: states[:scheduled],
    )


def cache(rows: int = BLOCKS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made = torch.ones(rows, 2, 4, 8, dtype=dtype)
    made[:, 0, 0, 0] = NAN
    made[:, 1, 3, 7] = INF
    return made


def bad(made: torch.Tensor) -> list[int]:
    """Rows in which something is not finite."""
    return [row for row in range(made.shape[0]) if not torch.isfinite(made[row].float()).all()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_the_blocks_of_the_request_are_cleaned(dtype: torch.dtype) -> None:
    """What others hold is not even read: the price is by what the request wrote, not by the cache."""
    first, second = cache(dtype=dtype), cache(2 * BLOCKS, dtype)  # the kernel's blocks may be smaller
    step = runner(first, second, loud=([1, 4],), quiet=([0],))
    NotFiniteGuard(step)
    logits = torch.zeros(2, 16)
    logits[0, 3] = NAN
    assert step._get_nans_in_logits(logits) == {"loud": 1, "quiet": 0}
    assert bad(first) == [0, 2, 3, 5]
    assert bad(second) == [0, 1, 4, 5, 6, 7, 10, 11]
    assert first[1, 0, 0, 0] == 0
    assert first[1, 0, 0, 1] == 1, "what was finite stays"


def test_the_blocks_of_all_groups_and_of_all_requests_that_made_one() -> None:
    held = cache()
    step = runner(held, a=([1], [2]), b=([3], [4]))
    NotFiniteGuard(step)
    step._get_nans_in_logits(torch.full((2, 4), NAN))
    assert bad(held) == [0, 5]


@pytest.mark.parametrize("unknown", ["layout", "request"])
def test_everything_is_cleaned_where_the_blocks_are_not_known(unknown: str) -> None:
    held = cache(BLOCKS if unknown == "request" else BLOCKS + 1)
    step = runner(held, a=([1],))
    NotFiniteGuard(step)
    if unknown == "request":
        step.requests.clear()
    step._get_nans_in_logits(torch.full((1, 4), NAN))
    assert bad(held) == []


def test_a_finite_step_costs_one_look_at_the_logits() -> None:
    held = cache()
    step = runner(held, a=([1],))
    step._get_nans_in_logits = None  # would be called
    NotFiniteGuard(step)
    assert step._get_nans_in_logits(torch.zeros(1, 4)) == {}
    assert bad(held) == list(range(BLOCKS))


@pytest.mark.parametrize("kind", [NAN, INF])
def test_what_is_pooled_of_a_request_with_nan_is_none_and_its_blocks_are_cleaned(kind: float) -> None:
    held = cache()
    step = runner(held, loud=([1, 4],), quiet=([0],))
    NotFiniteGuard(step)
    states = torch.ones(7, 8)
    states[1, 3] = kind  # the second of the loud one's three tokens; the last two rows are nobody's
    pooled = step._pool(states, 5, [3, 2], None)
    assert bad(pooled) == [0, 1, 2]
    assert bool((pooled[3:] == 1).all())
    assert bad(held) == [0, 2, 3, 5]


def test_a_later_piece_of_its_prompt_is_none_either() -> None:
    """It reads a cache that was cleaned, and would be finite and wrong."""
    held = cache()
    step = runner(held, loud=([1],), quiet=([0],))
    NotFiniteGuard(step)
    assert bad(step._pool(torch.full((2, 8), NAN), 2, [2, 0], None)) == [0, 1]
    held.fill_(NAN)
    assert bad(step._pool(torch.ones(4, 8), 4, [1, 3], None)) == [0]
    assert bad(held) == list(range(BLOCKS)), "there is nothing new to clean"
    step.input_batch.req_ids = ["quiet"]
    assert bad(step._pool(torch.ones(4, 8), 4, [4], None)) == []


@pytest.mark.parametrize("cpu", [True, False])
def test_where_steps_overlap_blocks_are_zeroed_as_they_are_given_out(
    cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(not_finite.current_platform, "is_cpu", lambda: cpu)
    step = runner(cache(), a=([1],))
    step._init_kv_zero_meta = lambda: step.zeroed.append("ready")
    NotFiniteGuard(step).zero_new_blocks()
    assert step.zeroed == ([] if cpu else ["ready"])
    assert not_finite.zeroes_new_blocks() is not cpu

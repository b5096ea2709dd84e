"""Norms of products that are never formed, against the products."""

from __future__ import annotations

import pytest
import torch

from adapters.inspection import tensor_stats as values
from adapters.inspection.tensor_stats import (
    extremes,
    largest_product_row,
    largest_row,
    one_thread,
    product_norm,
    spectral_norm,
)


@pytest.mark.parametrize("part", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_norm_is_that_of_the_product(
    part: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "_PART", part)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 33, generator=generator).to(dtype)
    b = torch.randn(21, 5, generator=generator).to(dtype)
    assert product_norm(a, b) == pytest.approx((b.double() @ a.double()).norm().item(), rel=1e-9)


@pytest.mark.parametrize("part", [1, 7, 1 << 20])
@pytest.mark.parametrize("rank", [1, 5, 40])
def test_spectral_norm_and_longest_rows_are_those_of_the_product(
    part: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "_PART", part)
    generator = torch.Generator().manual_seed(rank)
    a, b = torch.randn(rank, 33, generator=generator), torch.randn(21, rank, generator=generator)
    a[0] *= 100  # far from evenly spread
    product = b.double() @ a.double()
    assert spectral_norm(a, b) == pytest.approx(torch.linalg.matrix_norm(product, 2).item(), rel=1e-6)
    assert largest_product_row(a, b) == pytest.approx(product.norm(dim=1).max().item(), rel=1e-6)
    assert largest_row(a) == pytest.approx(a.double().norm(dim=1).max().item(), rel=1e-9)
    assert spectral_norm(torch.cat([a, a]), torch.cat([b, -b], 1)) < 1e-3 * spectral_norm(a, b)


def test_what_cancels_out_is_nothing_and_what_is_small_is_not() -> None:
    a, b = torch.randn(3, 40), torch.randn(50, 3)
    doubled = torch.cat([a, a])
    assert product_norm(doubled, torch.cat([b, -b], 1)) == 0
    change = torch.zeros_like(b)
    change[7, 1] = 1e-4
    small = product_norm(doubled, torch.cat([b + change, -b], 1))
    assert small == pytest.approx(1e-4 * a[1].norm().item(), rel=1e-2)
    assert product_norm(a * 1e-30, b * 1e-30) > 0
    assert product_norm(a, torch.zeros_like(b)) == 0


def test_extremes_find_what_is_not_finite() -> None:
    assert extremes(torch.tensor([[3.0, -2.0]])).tolist() == [-2, 3]
    assert extremes(torch.tensor([1.0, float("nan"), 2.0])).isnan().any()


def test_the_number_of_threads_comes_back() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before

"""What the numbers in a pair of matrices say: finite as served, and how much they change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from adapters.inspection.safetensors_header import ITEM_BYTES

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}

# Bounds the float64 copy of a part of a matrix, in elements.
_PART = 1 << 20
# Of the largest that BA could be: below this it is zero but for float64's rounding.
_NOTHING = 1e-7


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Beside a busy engine two OpenMP threads wait for each other at every tensor: 12 s instead of 0.5 s.

    The number belongs to the calling thread, which gets its own back at the end.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def extremes(tensor: torch.Tensor) -> torch.Tensor:
    """(2,): the smallest and the largest element; NaN where there is one."""
    return torch.stack(tensor.aminmax())


def product_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """The Frobenius norm of ``b @ a``, for a (rank, in) and b (out, rank); 0 where the two cancel out.

    ||BA||² = tr(AᵀBᵀBA) = tr((BᵀB)(AAᵀ)): two matrices of (rank, rank) instead of one of (out, in).
    """
    of_a, of_b = _gram(a), _gram(b.T)
    norm = max((of_a * of_b).sum().item(), 0.0) ** 0.5
    largest = (of_a.trace() * of_b.trace()).item() ** 0.5
    return 0.0 if norm <= _NOTHING * largest else norm


def spectral_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest singular value of ``b @ a``, for a (rank, in) and b (out, rank).

    With AAᵀ = SSᵀ it is the root of the largest eigenvalue of Sᵀ(BᵀB)S: matrices of (rank, rank) only.
    """
    values, vectors = torch.linalg.eigh(_gram(a))
    root = vectors * values.clamp(min=0).sqrt()
    largest: float = torch.linalg.eigvalsh(root.T @ _gram(b.T) @ root)[-1].clamp(min=0).sqrt().item()
    return largest


def largest_row(matrix: torch.Tensor) -> float:
    """The Euclidean length of the longest row."""
    lengths = [row.double().norm().item() for row in matrix]
    return max(lengths, default=0.0)


def largest_product_row(a: torch.Tensor, b: torch.Tensor) -> float:
    """The Euclidean length of the longest row of ``b @ a``: that of row i is √(b_i AAᵀ b_iᵀ)."""
    of_a, longest = _gram(a), 0.0
    step = max(1, _PART // b.shape[1])
    for at in range(0, b.shape[0], step):
        rows = b[at : at + step].double()
        longest = max(longest, ((rows @ of_a) * rows).sum(1).max().item())
    return float(max(longest, 0.0) ** 0.5)


def _gram(rows: torch.Tensor) -> torch.Tensor:
    """(rank, rank) in float64: every row times every row."""
    rank, length = rows.shape
    total = torch.zeros(rank, rank, dtype=torch.float64)
    step = max(1, _PART // rank)
    for at in range(0, length, step):
        part = rows[:, at : at + step].double()
        total += part @ part.T
    return total

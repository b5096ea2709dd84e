"""Weights as pickles, which are never read."""

from __future__ import annotations

from collections.abc import Iterable

from adapters.model import WEIGHTS_FILE

PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")


def ignored_pickles(names: Iterable[str]) -> str:
    """The warning about pickled weights beside the safetensors file."""
    return f"{', '.join(names)} beside {WEIGHTS_FILE} was ignored: pickled weights are never opened"

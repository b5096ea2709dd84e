"""Dotted names of modules, as ``model.layers.3.self_attn.q_proj``. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

V = TypeVar("V")


def suffixes(module: str) -> Iterator[str]:
    """``a.b.c`` -> ``a.b.c``, ``b.c``, ``c``."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module


def leaf(module: str) -> str:
    return module.rpartition(".")[2]


def layer_of(module: str) -> int | None:
    """The first number in the name: ``model.layers.3.mlp.experts.7.up_proj`` -> 3."""
    return next((int(part) for part in _numbers(module)), None)


def template(module: str) -> str:
    """The name with its layer left open, so that the same module of every layer is equal."""
    layer = next(_numbers(module), None)
    return module if layer is None else module.replace(f".{layer}.", ".*.", 1)


def kind_of(module: str) -> str:
    """The name within its layer: ``self_attn.q_proj``; the whole name where there is no layer."""
    return template(module).rpartition(".*.")[2]


def match(pattern: Mapping[str, V], module: str) -> V | None:
    """PEFT's ``get_pattern_key`` for literal keys: a suffix at a "." boundary, the first in the file wins."""
    found = set(suffixes(module))
    return next((value for key, value in pattern.items() if key in found), None)


def _numbers(module: str) -> Iterator[str]:
    return (part for part in module.split(".") if part.isdecimal() and part.isascii() and len(part) < 10)

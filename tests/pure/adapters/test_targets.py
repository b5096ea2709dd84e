"""Which modules are targeted, held against PEFT's own function."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from adapters.inspection.targets import Targets
from tests.support.calls import calls_of

MODULES = [
    "lm_head",
    "layers.0.mlp.up_proj",
    *(
        f"model.layers.{n}.{kind}"
        for n in (0, 1, 11)
        for kind in ("self_attn.q_proj", "mlp.up_proj", "mlp.experts.1.up_proj")
    ),
]
TARGETS: list[Any] = [
    ["q_proj"],
    ["up_proj", "model.layers.1.self_attn.q_proj"],
    ["mlp.up_proj", "proj"],
    [],
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self.attn.q_proj",
    "q_proj",
]
EXCLUDED: list[Any] = [None, [], ["q_proj"], "model.layers.0.mlp.up_proj", ["model.layers.11.mlp.up_proj"]]
LAYERS: list[Any] = [None, [], 1, [0, 11]]
PATTERNS: list[Any] = [None, [], "layers", ["h", "layers"], ["experts"], "la.ers", ""]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("excluded", EXCLUDED, ids=str)
def test_the_answer_is_pefts(targets: Any, excluded: Any) -> None:
    for layers, pattern in itertools.product(LAYERS, PATTERNS):
        config = LoraConfig(target_modules=["x"])
        config.target_modules, config.exclude_modules = targets, excluded
        config.layers_to_transform, config.layers_pattern = layers, pattern
        ours = Targets.of(targets, excluded, layers, pattern)
        for module in MODULES:
            theirs = check_target_module_exists(config, module)
            assert ours.covers(module) == (bool(theirs) and type(theirs).__name__ != "_ExcludedModule")


def test_all_linear_is_every_module() -> None:
    assert Targets.of("all-linear", ["q_proj"], None, None).covers("a.up_proj")
    assert not Targets.of("all-linear", ["q_proj"], None, None).covers("a.q_proj")


def test_expressions_are_not_run() -> None:
    module = "a" * 60
    evil = "(a|a)*b"
    assert Targets.of(evil, None, None, None).covers(module) is None
    assert Targets.of([module], evil, None, None).covers(module) is None
    assert Targets.of(["q_proj"], None, [1], [evil]).covers("model.layers.1.q_proj") is None
    assert Targets.of(["x"], evil, None, None).covers(module) is False
    assert re.fullmatch("a+", module)


class Name(str):
    """Its comparisons are calls, and thus counted."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other)


def test_the_longest_lists_are_cheap() -> None:
    names, others = ([Name(f"{letter}{n}") for n in range(100_000)] for letter in "nm")
    modules = [f"model.layers.{n}.mlp.up_proj" for n in range(1000)]

    def look() -> None:
        targets = Targets.of(names, others, range(100_000), ["x"] * 100_000)
        assert not any(map(targets.covers, modules))

    assert calls_of(look) < 200_000, "of a hundred million pairs"

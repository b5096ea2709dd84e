"""Which modules are targeted, held against PEFT's own function."""

from __future__ import annotations

import itertools
import sys
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


def test_expressions_are_run_where_asked_and_end() -> None:
    module, evil = "a" * 60, "(a|a)*b"
    for targets, name in (
        (Targets.of(evil, None, None, None), module),
        (Targets.of([module], evil, None, None), module),
        (Targets.of(["q_proj"], None, [1], [evil]), f"{module}.1.q_proj"),
    ):
        assert targets.covers(name) is None
    assert targets.run([name]).covers(name) is None, "it has an end"
    assert Targets.of(["x"], evil, None, None).covers(module) is False
    with pytest.raises(ValueError, match="unterminated subpattern"):
        Targets.of("(q_proj", None, None, None).run([module])
    deep = Targets.of("(" * 5000 + "a" + ")" * 5000, None, None, None)
    with pytest.raises(ValueError, match="recursion"):
        deep.run([module])


RUN: list[tuple[Any, Any, Any, Any]] = [
    (r".*\.(q|up)_proj", None, None, None),
    (r".*k_proj", None, None, None),
    (r".*_proj", r".*layers\.1\..*", None, None),
    (["q_proj"], r".*q_proj", None, None),
    (["q_proj", "up_proj"], None, [1, 11], ["h", "la.ers"]),
    (["up_proj"], None, 1, ["(layers|experts)"]),
    (r"(?i).*Q_PROJ", None, [0], ["la.ers"]),
    (["q_proj"], None, [1], ["model|zzz", "layers"]),
    (["q_proj"], None, [1], ["zzz|layers", "model|zzz"]),
]


@pytest.mark.parametrize("fields", RUN, ids=str)
def test_what_is_run_is_pefts(fields: tuple[Any, Any, Any, Any]) -> None:
    config = LoraConfig(target_modules=["x"])
    config.target_modules, config.exclude_modules = fields[:2]
    config.layers_to_transform, config.layers_pattern = fields[2:]
    ours = Targets.of(*fields).run(MODULES)
    for module in MODULES:
        theirs = check_target_module_exists(config, module)
        assert ours.covers(module) == (bool(theirs) and type(theirs).__name__ != "_ExcludedModule"), module


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/false"])
def test_expressions_that_could_not_be_run_are_told_to_the_operator(
    python: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", python)
    assert Targets.of(".*q_proj", None, None, None).run(MODULES).covers(MODULES[1]) is None
    assert "go unchecked" in caplog.text


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

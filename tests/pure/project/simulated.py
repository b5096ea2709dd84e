"""A simulation for the tests of the bench, in a module that the process of a round imports in no time."""

from __future__ import annotations

from tests.bench.scenario import Round, Values


def number_of(round_: Round) -> Values:
    return {"x": float(round_.number)}

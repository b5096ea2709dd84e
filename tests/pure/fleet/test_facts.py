"""What a gateway says of replicas that differ."""

from __future__ import annotations

from typing import Any

from adapters.model import BaseModel
from server.engine.parsers import Parsers
from server.engine.sizing import EngineCapacity
from server.fleet.facts import Facts, common


def told(**changes: Any) -> Facts:
    given: dict[str, Any] = {
        "base": BaseModel("base", {}, 8),
        "max_model_len": 4096,
        "max_running": 32,
        "capacity": EngineCapacity(2, 4, 1, 1),
        "dtype": "float32",
        "engine": "1",
        "parsers": Parsers("hermes", None, tools_shown=True),
    }
    return Facts(**given | changes)


def test_most_of_them_are_believed_and_the_first_of_as_many() -> None:
    assert common([told()]) == told()
    assert common([told(engine="2"), told(), told()]).engine == "1"
    assert common([told(engine="2"), told(), told(engine="2")]).engine == "2"
    assert common([told(dtype="bfloat16"), told()]).dtype == "bfloat16"


def test_what_is_filled_in_fits_all_of_them() -> None:
    found = common([told(), told(), told(engine="2", max_model_len=2048, max_running=64)])
    assert (found.engine, found.max_model_len, found.max_running) == ("1", 2048, 32)
    found = common([told(max_model_len=1024), told(engine="2"), told(engine="2")])
    assert (found.engine, found.max_model_len) == ("2", 1024)

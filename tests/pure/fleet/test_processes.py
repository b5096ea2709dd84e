"""What a fleet on one machine consists of."""

from __future__ import annotations

from pathlib import Path

from server.fleet.processes import members
from server.settings import Settings


def test_replicas_have_the_ports_after_the_gateways(tmp_path: Path) -> None:
    made = members(Settings(model="/m", data_dir=tmp_path, port=8000), 2)
    assert [(one.name, one.settings["ROLE"], one.settings.get("PORT")) for one in made] == [
        ("replica-1", "replica", "8001"),
        ("replica-2", "replica", "8002"),
        ("gateway", "gateway", None),
    ]
    assert len({one.settings["FLEET_KEY"] for one in made}) == 1
    assert len(made[0].settings["FLEET_KEY"]) >= 16


def test_a_key_that_is_set_is_everybodys(tmp_path: Path) -> None:
    key = "a-key-of-enough-letters"
    made = members(Settings(model="/m", data_dir=tmp_path, fleet_key=key), 1)
    assert {one.settings["FLEET_KEY"] for one in made} == {key}

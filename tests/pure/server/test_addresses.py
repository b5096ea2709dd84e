"""Addresses to listen on, and where replicas and gateways are asked that do."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from server.settings import Settings
from server.settings.addresses import family_of, from_here, is_every, url_of

EVERY = ("0.0.0.0", "::", "0::0", "")


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("0.0.0.0", "127.0.0.1"),
        ("", "127.0.0.1"),
        ("::", "::1"),
        ("127.0.0.1", "127.0.0.1"),
        ("10.0.0.5", "10.0.0.5"),
        ("fd00::5", "fd00::5"),
        ("node-7", "node-7"),
    ],
)
def test_where_who_listens_is_asked_on_the_same_machine(host: str, here: str) -> None:
    assert from_here(host) == here
    assert is_every(host) == (host in EVERY)


def test_urls_and_sockets_of_both_kinds() -> None:
    assert url_of("10.0.0.5", 8101) == "http://10.0.0.5:8101"
    assert url_of("fd00::5", 8101) == "http://[fd00::5]:8101"
    assert (family_of("node-7"), family_of("::1")) == (socket.AF_INET, socket.AF_INET6)


def replica(folder: Path, **changes: Any) -> Settings:
    given = {"model": "/m", "data_dir": folder, "role": "replica", "fleet_key": "f" * 16, "port": 8101}
    return Settings(**given | changes)


def test_where_gateways_reach_a_replica(tmp_path: Path) -> None:
    assert replica(tmp_path, host="fd00::5").reached_at == "http://[fd00::5]:8101"
    assert replica(tmp_path, host="10.0.0.5").reached_at == "http://10.0.0.5:8101"
    assert replica(tmp_path, host="::", replica_url="http://r-1:8101").reached_at == "http://r-1:8101"


@pytest.mark.parametrize("host", EVERY)
def test_a_replica_that_listens_everywhere_says_where_it_is_reached(tmp_path: Path, host: str) -> None:
    with pytest.raises(ValueError, match="LORAPLEX_REPLICA_URL must say where"):
        replica(tmp_path, host=host)

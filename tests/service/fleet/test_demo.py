"""What ``make fleet`` does to a fleet, whoever started its processes."""

from __future__ import annotations

import os
import socket

import pytest

from server.demo.client import DemoError
from server.demo.fleet import process_at
from tests.support.ports import unused


def test_the_process_that_listens_on_a_port_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            assert process_at(port) == os.getpid()


def test_nobody_is_killed_where_nobody_listens() -> None:
    with pytest.raises(DemoError, match="no process listens"):
        process_at(unused())

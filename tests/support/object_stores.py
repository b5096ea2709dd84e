"""Object stores to test on: a folder, and S3 as moto speaks it, over HTTP on 127.0.0.1."""

from __future__ import annotations

import itertools
import logging
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moto.server import ThreadedMotoServer

KINDS = ("file", "s3")
_BUCKETS = itertools.count()


class S3:
    """A server that can be stopped, and started again with what it had."""

    def __init__(self) -> None:
        self._server: ThreadedMotoServer | None = None
        self.port = 0

    def start(self) -> None:
        # Here alone: an engine that is forked from a process with Flask in it does not start, since vLLM
        # looks at every name of every module that is imported, and Flask's answer within a request only.
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()
        _, self.port = self._server.get_host_and_port()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    def bucket(self) -> str:
        """The URL of a new, empty one."""
        name = f"loraplex-{os.getpid()}-{next(_BUCKETS)}"
        request = urllib.request.Request(f"{self.endpoint}/{name}", method="PUT")
        urllib.request.urlopen(request).close()
        return f"s3://{name}/some/prefix"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_REGION": "us-east-1",
        }


@contextmanager
def s3_server() -> Iterator[S3]:
    """One that runs inside the block."""
    server = S3()
    server.start()
    try:
        yield server
    finally:
        server.stop()


def url_of(kind: str, s3: S3, folder: Path) -> str:
    """A new, empty store of that kind."""
    return s3.bucket() if kind == "s3" else (folder / "objects").as_uri()

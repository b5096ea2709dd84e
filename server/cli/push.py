"""``loraplex adapters push``: an upload as a job, with progress, that may be repeated without harm."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from adapters.inspection.unused import TEMPLATES_FOLDER, is_unused
from adapters.model import CHAT_FILES, CONFIG_FILE, INITIAL_FILE, PROBES_FILE, WEIGHTS_FILE
from server.cli.client import AdminClient, RemoteError

if TYPE_CHECKING:
    from rich.progress import Progress

_NEEDED = (CONFIG_FILE, WEIGHTS_FILE)
_FILES = (*_NEEDED, INITIAL_FILE, PROBES_FILE, *CHAT_FILES)
_PIECE = 1 << 20
_STATES = {
    "receiving": "sent",
    "inspecting": "being inspected",
    "probing": "being tried in the engine",
    "linking": "being made a version",
}


@dataclass(frozen=True, slots=True)
class Push:
    """An upload: its files' folder, and what the server is told beside them."""

    folder: Path
    query: Mapping[str, str]

    def unused(self) -> list[str]:
        """Files in the folder that are not sent, since no version has a use for them."""
        templates = sorted(self.folder.glob(f"{TEMPLATES_FOLDER}/*.jinja"))
        found = [*self.folder.glob("*"), *templates]
        return [name for path in found if is_unused(name := path.relative_to(self.folder).as_posix())]

    def key(self) -> str:
        """Of the same files with the same options the same: the Idempotency-Key."""
        digest = hashlib.sha256(repr(sorted(self.query.items())).encode())
        with self._opened() as files:
            for name, file in files.items():
                digest.update(f"\0{name}\0{file.seek(0, 2)}\0".encode())
                file.seek(0)
                while piece := file.read(_PIECE):
                    digest.update(piece)
        return f"push-{digest.hexdigest()}"

    def send(
        self, server: AdminClient, tenant: str, name: str, *, again: bool
    ) -> tuple[dict[str, Any], bool]:
        """(the new version's document, whether it was there already). ``again`` makes one in any case.

        Raises RemoteError: also the code of a refusal.
        """
        from rich.console import Console
        from rich.progress import Progress

        path = ("tenants", tenant, "adapters", name)
        known = _versions(server, path)
        key = f"push-{secrets.token_hex(32)}" if again else self.key()
        with Progress(console=Console(stderr=True), transient=True) as progress:
            with self._opened(progress) as files:
                query = {**self.query, "wait": "false"}
                job = server.upload(*path, "versions", files=files, key=key, query=query)
            made = _followed(server, path, job, progress)
        return made, made["version"] in known

    @contextmanager
    def _opened(self, progress: Progress | None = None) -> Iterator[dict[str, IO[bytes]]]:
        with ExitStack() as stack:
            files: dict[str, IO[bytes]] = {}
            try:
                for file in _FILES:
                    path = self.folder / file
                    if file in _NEEDED or path.exists():
                        opened = progress.open(path, "rb", description=file) if progress else path.open("rb")
                        files[file] = stack.enter_context(opened)
            except OSError as exc:
                reason = f"{self.folder} is not an adapter's folder: {exc.strerror or exc}: {exc.filename}"
                raise RemoteError("no_adapter", reason) from exc
            yield files


def _versions(server: AdminClient, path: tuple[str, ...]) -> set[int]:
    try:
        return {version["version"] for version in server.get(*path)["versions"]}
    except RemoteError as exc:
        if exc.code != "adapter_not_found":
            raise
        return set()


def _followed(
    server: AdminClient, path: tuple[str, ...], job: Mapping[str, Any], progress: Progress
) -> dict[str, Any]:
    """The answer of ``job`` when it has ended; RemoteError where it was refused."""
    task = progress.add_task("sent", total=None)
    wait = 0.05
    while True:
        if job["state"] == "done":
            return dict(job["result"])
        if (error := job["error"]) is not None:
            raise RemoteError(str(error["code"]), str(error["message"]))
        progress.update(task, description=_STATES.get(job["state"], job["state"]))
        time.sleep(wait)
        wait = min(1.0, wait * 1.5)
        job = server.get(*path, "uploads", job["id"])

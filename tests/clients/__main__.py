"""``make clients``: each library against a real server, and the table in docs/clients.md.

    python -m tests.clients PYTHON [MODULES] [LIBRARY …]

PYTHON is the interpreter of the environment that has the Python libraries, MODULES the folder whose
``node_modules`` has the others; without it these are left out. The exit status is 1 if a check failed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from server.app import create_app
from server.demo.base import cache_folder, prepare
from tests.clients.libraries_known import (
    CHECKS,
    EMBEDDERS,
    EMBEDDINGS,
    JAVASCRIPT,
    JAVASCRIPT_EMBEDDERS,
    NOT_THERE,
    NOT_TRIED,
    PYTHON,
    REASONS,
    WHY_NOT,
    WITH_OPENAI_2,
)
from tests.engine.reference import ATTENTION, Reference, Spec
from tests.support.site import engine_settings, serving

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "clients.md"
MARKS = "<!-- matrix: written by `make clients` -->", "<!-- /matrix -->"


# Libraries that look for something of their vendors' at a start are told to do without.
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HAYSTACK_TELEMETRY_ENABLED": "False"}


@dataclass
class Result:
    version: str = "?"
    errors: dict[str, str | None] = field(default_factory=dict)


async def ask(library: str, command: list[str], environment: Mapping[str, str]) -> Result:
    """Runs one library's checks in a process of its own; what it prints beside them is passed on."""
    process = await asyncio.create_subprocess_exec(
        *command, env={**os.environ, **OFFLINE, **environment}, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    found = Result()
    async for line in process.stdout:
        try:
            said = json.loads(line)
        except ValueError:
            continue  # a library's own words
        if "version" in said:
            found.version = said["version"]
        elif "check" in said:
            found.errors[said["check"]] = said["error"]
            print(f"{library}: {said['check']}: {said['error'] or 'ok'}", flush=True)
    if await process.wait() or not found.errors:
        found.errors["(starts)"] = f"the process ended with {process.returncode}"
        print(f"{library}: {found.errors['(starts)']}", flush=True)
    return found


def table(results: Mapping[str, Result], before: str) -> str:
    """One row a library: what was tried now, over what ``before``, the last table, has of it.

    A cell: it passes, or not, or the library has no such thing (``REASONS``), or (``?``) it was not tried.
    """
    rows = {row[0]: row for line in before.splitlines() if len(row := _cells(line)) == len(CHECKS) + 2}
    notes = [line for line in before.splitlines() if line.startswith("- ") and not line.startswith("- `")]
    for library, result in results.items():
        known = dict(zip(CHECKS, rows.get(library, [])[2:], strict=False))
        for check, error in result.errors.items():
            known[check] = "yes" if error is None else "**no**"
            notes = [note for note in notes if not note.startswith(f"- {library}, {check}: ")]
            notes += [] if error is None else [f"- {library}, {check}: {error}"]
        rows[library] = [library, result.version, *(known.get(check, NOT_TRIED) for check in CHECKS)]
    for library, row in rows.items():
        for place, check in enumerate(CHECKS, 2):
            if row[place] in (NOT_THERE, NOT_TRIED):
                row[place] = NOT_THERE if (library, check) in REASONS else NOT_TRIED
    head = f"| library | version | {' | '.join(CHECKS)} |", f"| --- | --- |{' --- |' * len(CHECKS)}"
    order = [*PYTHON, *JAVASCRIPT]
    shown = [f"| {' | '.join(rows[library])} |" for library in order if library in rows]
    reasons = [f"- `–` {library}, {check}: {reason}." for (library, check), reason in REASONS.items()]
    return "\n".join([*head, *shown, "", WHY_NOT, "", *reasons, *(["", *notes] if notes else [])])


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else []


def write(results: Mapping[str, Result]) -> None:
    """Puts ``results`` into the page."""
    before, rest = PAGE.read_text().split(MARKS[0])
    last, after = rest.split(MARKS[1])
    PAGE.write_text(f"{before}{MARKS[0]}\n{table(results, last)}\n{MARKS[1]}{after}")


@asynccontextmanager
async def served(folder: Path, **engine_args: object) -> AsyncIterator[dict[str, str]]:
    """A server on the demo's base with one adapter; what a library is told of it."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; else nearly all memory, which others use too
    base = prepare(cache_folder())
    adapter = folder.parent / "adapter"
    if not adapter.exists():
        Reference(base).make(Spec(seed=5, rank=8, targets=ATTENTION), adapter)
    settings = engine_settings(
        base,
        folder,
        {"dtype": "float32", **engine_args},
        gpu_slots=2,
        host_slots=2,
        max_lora_rank=16,
        max_model_len=1024,
    )
    async with serving(create_app(settings)) as site:
        key = await site.tenant("clients", {"support": adapter})
        narrow = {"limits": {"requests_at_once": 1}}
        made = await site.admin.post("/admin/v1/tenants/clients/keys", json=narrow)
        yield {"URL": site.url, "KEY": key, "NARROW_KEY": made.json()["key"], "MODEL": "support"}


async def text(folder: Path, python: str, modules: str | None, wanted: list[str]) -> dict[str, Result]:
    results: dict[str, Result] = {}
    async with served(folder) as environment:
        for library, command, more in _commands(PYTHON, JAVASCRIPT, python, modules, wanted):
            results[library] = await ask(library, command, environment | more)
            write(results)
    return results


async def embeddings(folder: Path, python: str, modules: str | None, wanted: list[str]) -> dict[str, Result]:
    results: dict[str, Result] = {}
    async with served(folder, runner="pooling", convert="embed") as environment:
        for library, command, more in _commands(EMBEDDERS, JAVASCRIPT_EMBEDDERS, python, modules, wanted):
            results[library] = await ask(library, [*command, EMBEDDINGS], environment | more)
    return results


def _commands(
    pythons: Sequence[str], scripts: Sequence[str], python: str, modules: str | None, wanted: list[str]
) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """(library, command, more of its environment)."""
    for library in pythons:
        if not wanted or library in wanted:
            older = str(Path(python).parents[1] / "openai2" / "bin" / "python")
            with_it = older if library in WITH_OPENAI_2 else python
            yield library, [with_it, str(HERE / "libraries.py"), library], {}
    for library in scripts if modules else ():
        if not wanted or library in wanted:
            yield library, ["node", str(HERE / "libraries.mjs"), library], {"MODULES": str(modules)}


def main(python: str, modules: str | None, wanted: list[str]) -> int:
    """An engine each for text and embeddings, one after the other, in loops of their own."""
    with tempfile.TemporaryDirectory(prefix="loraplex-clients-") as made:
        results = asyncio.run(text(Path(made) / "text", python, modules, wanted))
        for library, result in asyncio.run(
            embeddings(Path(made) / "embeddings", python, modules, wanted)
        ).items():
            results.setdefault(library, result).errors |= result.errors
        write(results)
    return int(any(error for result in results.values() for error in result.errors.values()))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    place = arguments[1] if len(arguments) > 1 and arguments[1] else None
    raise SystemExit(main(arguments[0], place, arguments[2:]))

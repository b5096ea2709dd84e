"""README and docs/ say what the code says: settings, metrics, calls, codes, commands, files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.routing import APIRoute
from pydantic import ByteSize
from typer.main import get_command

from adapters.errors import CURES, AdapterUnfit
from server.app import create_app
from server.metrics import Metrics
from server.settings import Settings

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
SOURCES = sorted(path for package in ("server", "adapters") for path in (ROOT / package).rglob("*.py"))
LONGEST_FILE = 500
# Files of tests that are longer, and should be cut along their meaning: take a name out, add none.
LONG_TESTS = {
    "tests/service/cli/test_commands.py",
    "tests/service/store/test_backup.py", "tests/service/store/test_catalog.py",
    "tests/service/store/test_migrations.py",
    "tests/service/store/test_ownership.py", "tests/service/worker/test_experts.py",
}  # fmt: skip
LONGEST_README = 1500


def between(page: str, name: str) -> str:
    found = re.search(rf"<!-- {name}:.*?-->\n(.*?)\n<!-- /{name} -->", PAGES[page], re.DOTALL)
    assert found is not None
    return found[1]


def settings_table() -> str:
    rows = ["| variable | default | |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = "" if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(default, ByteSize):
            default = default.human_readable()
        shown = "" if default in (None, "", {}, ()) else f"`{default}`"
        rows.append(f"| `LORAPLEX_{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(rows)


def cures_table() -> str:
    return "\n".join(
        ["| code | cure |", "| --- | --- |", *(f"| `{code}` | {cure} |" for code, cure in CURES.items())]
    )


def test_settings() -> None:
    """To update: put the output of ``settings_table()`` between the two comments."""
    assert between("settings.md", "settings") == settings_table()


def test_cures() -> None:
    """To update: put the output of ``cures_table()`` between the two comments."""
    assert between("adapters.md", "cures") == cures_table()


def codes() -> Iterator[str]:
    """Every error code that the source spells out."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                given = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "code":
                given = [node.value]
            else:
                continue
            yield from (v.value for v in given if isinstance(v, ast.Constant) and isinstance(v.value, str))


@pytest.mark.parametrize("code", sorted(set(codes()) - {"adapter_error", "adapter_invalid"}))
def test_error_codes(code: str) -> None:
    assert any(f"`{code}`" in PAGES[page] for page in ("api.md", "admin.md", "adapters.md"))


def codes_of_failures() -> list[str]:
    """Those of the API's page whose requests end as ``failed`` or ``unavailable``, by a fault of the server's
    or of what is stored: all with a status of 500 and more, and of others those that are named here."""
    named = re.findall(r"^\| ([\d, ]+) \| ([^|]+) \|", PAGES["api.md"], re.MULTILINE)
    found = {code for status, cell in named if status.startswith("5") for code in quoted(cell)}
    return sorted(found | {AdapterUnfit.code})


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


@pytest.mark.parametrize("code", codes_of_failures())
def test_the_runbook_says_what_to_do_about_each_code_of_a_failure(code: str) -> None:
    part = PAGES["runbook.md"].partition("\n## Requests fail\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("| ")]
    assert code in quoted(" ".join(rows))


def test_admin_calls() -> None:
    app = create_app(Settings(model="/nowhere"))
    rows = [line for line in PAGES["admin.md"].splitlines() if line.startswith("| `") and "/" in line]
    documented = {
        part if part.startswith("/tenants") or part.count("/") == 1 else part.replace("…", "")
        for line in rows
        for part in re.findall(r"(?:/|…/)[\w{}/]+", line.split("|")[1])
    }
    for route in app.routes:
        if isinstance(route, APIRoute) and route.path.startswith("/admin/v1"):
            path = route.path.removeprefix("/admin/v1")
            short = path.replace("{tenant}", "{t}").replace("{key_id}", "{id}").replace("{version}", "{v}")
            assert any(short == d or (d.startswith("/versions") and short.endswith(d)) for d in documented), (
                path
            )


def test_inference_calls() -> None:
    app = create_app(Settings(model="/nowhere"))
    for route in app.routes:
        if isinstance(route, APIRoute) and route.include_in_schema and "/admin/" not in route.path:
            stem = re.sub(r"/\{.*", "", route.path)
            assert any(f"{stem}" in PAGES[page] for page in ("api.md", "admin.md", "metrics.md")), route.path


def test_metrics() -> None:
    names = set(re.findall(r"# TYPE (loraplex_\w+) ", Metrics().render().decode()))
    assert names
    for name in names:
        assert f"`{name}`" in PAGES["metrics.md"], name


def commands() -> Iterator[str]:
    from server.__main__ import cli

    def walk(command: object, path: str) -> Iterator[str]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield path
        for name, child in (inner or {}).items():
            yield from walk(child, f"{path} {name}")

    yield from walk(get_command(cli), "loraplex")


def test_commands() -> None:
    """Each with its group, or in a row of its group's names."""
    text = "\n".join([README, *PAGES.values()])
    for command in commands():
        *group, name = command.split()
        in_row = rf"`{' '.join(group)}`[^\n]*`{re.escape(name)}`"
        written = command in text or re.search(in_row, text) or f"python -m server {name}" in text
        assert written or name in ("serve", "demo"), command


def test_readme_is_short() -> None:
    assert len(README.split()) <= LONGEST_README


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_links_lead_somewhere(page: str) -> None:
    home = ROOT if page == "README.md" else ROOT / "docs"
    text = README if page == "README.md" else PAGES[page]
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert (home / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page: str) -> None:
    for path in re.findall(r"`((?:server|adapters|tests|config)/[\w./-]*)`", PAGES[page]):
        assert (ROOT / path).exists(), path


def test_what_is_named_beside_files_is_in_one_of_them() -> None:
    """In the table of where a change goes: a name that moved sends its reader to the wrong file."""
    rows = [
        line for line in PAGES["architecture.md"].splitlines() if line.startswith("| ") and ".py`" in line
    ]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`([^`]+)`", row)
        files = [ROOT / name for name in named if name.endswith((".py", ".lua"))]
        source = "".join(file.read_text() for file in files)
        found = {name.partition("(")[0].strip('"') for name in named if "/" not in name}
        assert {name for name in found if name.isidentifier() and name not in source} == set(), row


def test_every_page_is_on_the_map() -> None:
    for page in PAGES:
        assert f"(docs/{page})" in README, page


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_FILE


def test_no_other_test_is_longer() -> None:
    long = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("*.py")
        if len(path.read_text().splitlines()) > LONGEST_FILE
    }
    assert long <= LONG_TESTS, f"cut along their meaning: {sorted(long - LONG_TESTS)}"


def test_the_hall_is_small() -> None:
    assert len(list((ROOT / "server").glob("*.py"))) <= 8

"""The README's tables say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from fastapi.routing import APIRoute
from pydantic import ByteSize

from server.app import create_app
from server.metrics import Metrics
from server.settings import Settings

README = (Path(__file__).parents[3] / "README.md").read_text()


def settings_table() -> str:
    rows = ["| variable | default | |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = "" if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(default, ByteSize):
            default = default.human_readable()
        shown = "" if default in (None, "", {}, ()) else f"`{default}`"
        rows.append(f"| `LORAPLEX_{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(rows)


def test_settings() -> None:
    """To update: put the output of ``settings_table()`` between the two comments."""
    found = re.search(r"<!-- settings:.*?-->\n(.*?)\n<!-- /settings -->", README, re.DOTALL)
    assert found is not None
    assert found[1] == settings_table()


def test_admin_calls() -> None:
    app = create_app(Settings(model="/nowhere"))
    rows = [line for line in README.splitlines() if line.startswith("| `") and "/" in line]
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


def test_metrics() -> None:
    names = set(re.findall(r"# TYPE (loraplex_\w+) ", Metrics().render().decode()))
    assert names
    for name in names:
        assert f"`{name}`" in README, name

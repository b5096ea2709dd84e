"""What people type, by command: the last lines of each command's help."""

from __future__ import annotations

from collections.abc import Iterator

import typer
from typer.models import CommandInfo

RUNNING, CUSTOMERS, LOOKING, OFFLINE = (
    "Run a server",
    "Customers and adapters",
    "Look at a running server",
    "Without a server",
)
PANELS = {
    **dict.fromkeys(("serve", "demo", "fleet", "adopt", "backup", "restore", "check"), RUNNING),
    **dict.fromkeys(("tenants", "keys", "adapters", "rollouts", "people", "chat"), CUSTOMERS),
    **dict.fromkeys(
        ("top", "server", "requests", "usage", "audit", "residency", "replicas", "bench"), LOOKING
    ),
    **dict.fromkeys(("doctor", "merge", "dequantize", "probes", "version"), OFFLINE),
}
EXAMPLES = {
    "serve": ["LORAPLEX_MODEL=/models/llama loraplex serve", "loraplex serve --config config/laptop.yaml"],
    "demo": ["loraplex demo --once"],
    "doctor": ["loraplex doctor ./adapter --base /models/llama", "loraplex doctor ./adapter --server"],
    "merge": ["loraplex merge --base /models/llama --adapter ./adapter --out ./merged"],
    "dequantize": ["loraplex dequantize --base /models/llama-fp8 --out /models/llama-bf16"],
    "adopt": ["loraplex adopt --config config/laptop.yaml"],
    "backup": ["loraplex backup /mnt/backups/today"],
    "restore": ["loraplex restore /mnt/backups/today"],
    "check": [
        "loraplex check",
        "loraplex check --url http://127.0.0.1:8000",
        "loraplex check --backup /mnt/backups/today",
    ],
    "version": ["loraplex version"],
    "chat": ["loraplex chat support 'Where is my parcel?'", "loraplex chat support@3 --beside support@2"],
    "bench": [
        "loraplex bench http://127.0.0.1:8000 --keys keys.txt --rate 10 --plot times.html",
        "loraplex bench http://127.0.0.1:8000 --keys keys.txt --workload storm",
    ],
    "server": ["loraplex server", "loraplex server --json"],
    "usage": [
        "loraplex usage --by tenant,day --from 2026-11-01",
        "loraplex usage --tenant acme --by version --percentiles",
    ],
    "requests": [
        "loraplex requests --tenant acme --outcome failed",
        "loraplex requests --id 7ed32500dd44e1f0",
        "loraplex requests --slower-than 10",
    ],
    "audit": ["loraplex audit --tenant acme"],
    "residency": ["loraplex residency", "loraplex residency --events 100 --json"],
    "replicas": ["loraplex replicas"],
    "top": ["loraplex top"],
    "probes make": ["loraplex probes make --base /models/llama --adapter ./adapter --prompt 'Hello'"],
    "fleet up": ["loraplex fleet up --replicas 2 --config fleet.yaml"],
    "fleet demo": ["loraplex fleet demo --once"],
    "tenants list": ["loraplex tenants list"],
    "tenants show": ["loraplex tenants show acme"],
    "tenants create": [
        "loraplex tenants create acme --name 'Acme Corporation'",
        "loraplex tenants create acme --limits '{\"requests_per_minute\": 600}'",
    ],
    "tenants set": ["loraplex tenants set acme --weight 2", "loraplex tenants set acme --priority batch"],
    "tenants limits": ["loraplex tenants limits acme"],
    "tenants suspend": ["loraplex tenants suspend acme"],
    "tenants resume": ["loraplex tenants resume acme"],
    "tenants delete": ["loraplex tenants delete acme"],
    "keys list": ["loraplex keys list acme"],
    "keys create": ["loraplex keys create acme --name laptop"],
    "keys set": ["loraplex keys set acme 49f6b6208c280669 --scope inference --scope usage:read"],
    "keys rotate": ["loraplex keys rotate acme 49f6b6208c280669"],
    "keys revoke": ["loraplex keys revoke acme 49f6b6208c280669"],
    "adapters list": ["loraplex adapters list acme"],
    "adapters show": ["loraplex adapters show acme support"],
    "adapters find": ["loraplex adapters find support", "loraplex adapters find --has warning"],
    "adapters uploads": ["loraplex adapters uploads acme support"],
    "adapters download": ["loraplex adapters download acme support 2 --out support-2.tar"],
    "adapters note": ["loraplex adapters note acme support 2 'before the new tone'"],
    "adapters push": [
        "loraplex adapters push acme support ./adapter --note 'more of November'",
        "loraplex adapters push support ./adapter  # with a customer's own key",
    ],
    "adapters live": ["loraplex adapters live acme support 2"],
    "adapters rollback": ["loraplex adapters rollback acme support"],
    "adapters canary": [
        "loraplex adapters canary acme support 2=90 3=10",
        "loraplex adapters canary acme support --off",
    ],
    "adapters verify": ["loraplex adapters verify acme support"],
    "adapters quarantine": ['loraplex adapters quarantine acme support 2 --reason "it ends the engine"'],
    "adapters release": ["loraplex adapters release acme support 2"],
    "adapters default": ["loraplex adapters default acme support"],
    "adapters defaults": [
        "loraplex adapters defaults acme support '{\"max_tokens\": 200}'",
        "loraplex adapters defaults acme support none",
    ],
    "adapters warm": ["loraplex adapters warm acme support"],
    "adapters pin": ["loraplex adapters pin acme support"],
    "adapters unpin": ["loraplex adapters unpin acme support"],
    "adapters delete": ["loraplex adapters delete acme support"],
    "adapters delete-version": ["loraplex adapters delete-version acme support 1"],
    "rollouts start": ["loraplex rollouts start acme support 3"],
    "rollouts list": [
        "loraplex rollouts list",
        "loraplex rollouts list --state rolled_back",
        "loraplex rollouts list acme support",
    ],
    "rollouts show": ["loraplex rollouts show acme support"],
    "rollouts watch": ["loraplex rollouts watch acme support"],
    "rollouts pause": ["loraplex rollouts pause acme support"],
    "rollouts resume": ["loraplex rollouts resume acme support"],
    "rollouts forward": ["loraplex rollouts forward acme support"],
    "rollouts back": ["loraplex rollouts back acme support"],
    "people list": ["loraplex people list"],
    "people create": ["loraplex people create maria --role viewer"],
    "people delete": ["loraplex people delete maria"],
}


def add_to(cli: typer.Typer) -> None:
    """Gives each command below ``cli`` its examples, and its place among the others."""
    for path, command in commands(cli):
        command.epilog = "\n\n".join(f"$ {line}" for line in EXAMPLES.get(path, [])) or None
    for command in cli.registered_commands:
        command.rich_help_panel = PANELS.get(_name(command), RUNNING)
    for group in cli.registered_groups:
        group.rich_help_panel = PANELS.get(_name(group), RUNNING)


def commands(group: typer.Typer, prefix: str = "") -> Iterator[tuple[str, CommandInfo]]:
    """Each command below ``group``, by the words that it is called with."""
    for command in group.registered_commands:
        yield f"{prefix}{_name(command)}", command
    for inner in group.registered_groups:
        if inner.typer_instance is not None:
            yield from commands(inner.typer_instance, f"{prefix}{_name(inner)} ")


def _name(info: object) -> str:
    given = getattr(info, "name", None)
    if isinstance(given, str):
        return given
    return str(getattr(getattr(info, "callback", None), "__name__", "")).replace("_", "-")

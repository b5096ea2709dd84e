"""The command line: ``python -m server``; installed as ``loraplex``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapters.model import PROBES_FILE
from server import __version__
from server.cli import examples, reports
from server.cli.adapters import adapters
from server.cli.arguments import named_folder
from server.cli.bench import bench
from server.cli.chat import chat
from server.cli.command import LOCAL, Key, Url, connected, say
from server.cli.keys import keys
from server.cli.people import people
from server.cli.rollouts import rollouts
from server.cli.tenants import tenants

if TYPE_CHECKING:
    from server.settings import Settings

cli = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
probes = typer.Typer(no_args_is_help=True, help="What an adapter is checked against.")
cli.add_typer(probes, name="probes")
fleet = typer.Typer(no_args_is_help=True, help="Many engines behind one address.")
cli.add_typer(fleet, name="fleet")


@cli.command()
def serve(
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None,
) -> None:
    """Serve the base model and its adapters."""
    settings = _settings(config)
    # Before anything is touched; what a hub's id names is known only when it is loaded. A gateway loads none.
    is_folder = settings.role != "gateway" and settings.model.startswith(("/", "./", "../"))
    if is_folder and not Path(settings.model).exists():
        say("red", "LORAPLEX_MODEL:", f"there is no {settings.model}")
        raise SystemExit(3)
    raise SystemExit(_serve(settings, config))


@cli.command()
def demo(
    once: Annotated[bool, typer.Option(help="Stop after the answers.")] = False,
    port: Annotated[int | None, typer.Option(help="Port to serve on; 8000 if it is free.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for the base model and the demo's data.")] = None,
) -> None:
    """Three customers, three adapters, one small model, on this machine."""
    from server.demo.run import run

    raise SystemExit(run(once=once, port=port, cache=cache))


@fleet.command("up")
def fleet_up(
    replicas: Annotated[
        int, typer.Option(min=1, help="How many; here on the ports after the gateway's.")
    ] = 2,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None,
    by_ray: Annotated[bool, typer.Option("--ray", help="On Ray, in RAY_ADDRESS's cluster if set.")] = False,
    most: Annotated[int | None, typer.Option(min=1, help="With --ray: at most so many, by work.")] = None,
    gpus: Annotated[int, typer.Option(min=0, help="With --ray: GPUs of each replica.")] = 0,
    cpus: Annotated[float, typer.Option(min=0, help="With --ray: cores that each replica counts as.")] = 1,
) -> None:
    """Run a gateway and replicas, and start again what dies; without Ray on this machine alone."""
    settings = _settings(config)
    if not by_ray:
        from server.fleet.processes import up

        raise SystemExit(up(settings, replicas, config))
    try:
        from server.fleet import ray
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.partition(".")[0] != "ray":
            raise
        say("red", "Ray is not installed:", "pip install '.[ray]'")
        raise SystemExit(2) from exc
    plan = ray.Plan(replicas=replicas, most=most, gpus=gpus, cpus=cpus)
    raise SystemExit(ray.up(settings, plan, config))


@fleet.command("demo")
def fleet_demo(
    once: Annotated[bool, typer.Option(help="Stop after the answers.")] = False,
    port: Annotated[int | None, typer.Option(help="Port to serve on; 8000 if it is free.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for the base model and the demo's data.")] = None,
    by_ray: Annotated[
        bool | None, typer.Option("--ray/--no-ray", help="Under Ray; if not said, where that is installed.")
    ] = None,
) -> None:
    """Two replicas, six customers; one replica is killed in mid-stream."""
    from server.demo.fleet import run

    raise SystemExit(run(once=once, port=port, cache=cache, ray=by_ray))


@cli.command()
def doctor(
    adapter: Annotated[Path, typer.Argument(help="Folder that PEFT's save_pretrained wrote.")],
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base model; its weights are not loaded.")
    ] = None,
    max_rank: Annotated[int, typer.Option(help="The server's LORAPLEX_MAX_LORA_RANK.")] = 64,
    dtype: Annotated[str | None, typer.Option(help="What the server casts adapters to.")] = None,
    server: Annotated[
        bool, typer.Option("--server", help="Ask a running server for rank, dtype and base; needs --key.")
    ] = False,
    url: Url = LOCAL,
    key: Key = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what an upload would be answered: 0 accepted, 1 refused, 2 not to be told."""
    from server.cli import offline

    asked = None
    if server:
        with connected(url, key) as running:
            me = running.me()
            asked = running.get("server") if me is None else offline.served_to(me)
        if me is not None and "adapters:write" not in me["scopes"]:
            say("yellow", "scope_missing:", "this key itself may not upload: it lacks adapters:write")
    raise SystemExit(
        offline.doctor(adapter, base, max_rank=max_rank, dtype=dtype, server=asked, as_json=as_json)
    )


@cli.command()
def merge(
    base: Annotated[Path, typer.Option(help="Folder of the base model.")],
    adapter: Annotated[Path, typer.Option(help="Folder that PEFT's save_pretrained wrote.")],
    out: Annotated[Path, typer.Option(help="Folder to be made for the merged checkpoint.")],
    verify: Annotated[bool, typer.Option(help="Compare with base + PEFT, in float32 in memory.")] = True,
    tolerance: Annotated[float, typer.Option(help="Largest difference in a log-probability.")] = 0.1,
    dequantize: Annotated[bool, typer.Option(help="Write a quantized base out in bfloat16.")] = False,
) -> None:
    """Write base + adapter as one checkpoint, for a customer who outgrows sharing."""
    from server.cli import offline

    dtype = "bfloat16" if dequantize else None
    raise SystemExit(offline.merge(base, adapter, out, verify=verify, tolerance=tolerance, dequantize=dtype))


@cli.command()
def dequantize(
    base: Annotated[Path, typer.Option(help="Folder of a quantized base model.")],
    out: Annotated[Path, typer.Option(help="Folder to be made for the ordinary checkpoint.")],
) -> None:
    """Write a quantized base out in bfloat16: the model that a QLoRA was trained on."""
    from server.cli import offline

    raise SystemExit(offline.write_dequantized(base, out))


@probes.command("make")
def make_probes(
    base: Annotated[Path, typer.Option(help="Folder of the base model.")],
    adapter: Annotated[Path, typer.Option(help="Folder that PEFT's save_pretrained wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="File to be written; where `adapters push` looks if not given.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; several times for several.")] = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference in a log-probability.")] = 0.5,
) -> None:
    """Write what base + PEFT say, in float32, for the server to check an upload against."""
    from server.cli import offline

    raise SystemExit(
        offline.make_probes(
            base, adapter, out or adapter / PROBES_FILE, prompts=prompt or [], tolerance=tolerance
        )
    )


@cli.command()
def adopt(
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None,
) -> None:
    """Join a data folder to another or a restored database, with the server stopped; removes nothing."""
    from server.cli import data

    raise SystemExit(data.adopt(_settings(config)))


@cli.command()
def backup(
    folder: Annotated[
        Path,
        typer.Argument(parser=named_folder, help="Folder of the backup; only what it lacks is copied."),
    ],
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None,
) -> None:
    """Copy all adapters and rows, while the server runs or not."""
    from server.cli import data

    raise SystemExit(data.back_up(_settings(config), folder))


@cli.command()
def restore(
    folder: Annotated[Path, typer.Argument(parser=named_folder, help="Folder that `backup` wrote.")],
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None,
) -> None:
    """Copy a backup into an empty data folder and database, with the server stopped."""
    from server.cli import data

    raise SystemExit(data.restore(_settings(config), folder))


@cli.command()
def check(
    repair: Annotated[bool, typer.Option(help="Move what is broken aside; nothing is removed.")] = False,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None,
    url: Annotated[str, typer.Option(help="Ask the server there instead of reading its files.")] = "",
    key: Key = "",
    backup: Annotated[
        Path | None, typer.Option(parser=named_folder, help="Read a backup in this folder instead.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Hold all rows against the stored bytes, both ways: 0 all is well, 1 it is not, 2 it cannot be told."""
    from server.cli import data

    if backup is not None:
        if repair or url:
            raise typer.BadParameter(
                "--backup only looks, at a folder of this machine; leave --repair and --url out"
            )
        raise SystemExit(data.check_backup(backup, as_json=as_json))
    if not url:
        raise SystemExit(data.check(_settings(config), repair=repair, as_json=as_json))
    with connected(url, key) as server:
        found = server.post("check", body={"repair": repair}, seconds=3600)
        raise SystemExit(data.show_check(found, as_json=as_json))


@cli.command()
def version() -> None:
    """Print the version."""
    print(__version__)


cli.add_typer(tenants, name="tenants")
cli.add_typer(keys, name="keys")
cli.add_typer(adapters, name="adapters")
cli.add_typer(rollouts, name="rollouts")
cli.add_typer(people, name="people")
cli.command("chat")(chat)
cli.command("bench")(bench)
reports.add_to(cli)
examples.add_to(cli)


def _warn_of_strangers(known: Iterable[str]) -> None:
    """A misspelt variable would otherwise be a setting that silently stays at its default."""
    variables = {f"LORAPLEX_{name.upper()}" for name in [*known, "cache", "url", "key"]}
    for name in os.environ:
        if name.startswith("LORAPLEX_") and name not in variables:
            close = get_close_matches(name, variables, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            say("yellow", f"{name} is not a setting{hint}", "")


def _settings(config: Path | None) -> Settings:
    from pydantic import ValidationError

    from server.settings import SECRETS, Settings

    _warn_of_strangers([*Settings.model_fields, *(f"{name}_file" for name in SECRETS)])
    try:
        return Settings.load(config)
    except ValidationError as exc:
        for error in exc.errors():
            name = "_".join(str(part) for part in error["loc"]).upper()
            say("red", f"{f'LORAPLEX_{name}' if name else 'settings'}:", error["msg"])
        raise SystemExit(2) from exc
    except (FileNotFoundError, ValueError) as exc:
        say("red", str(exc), "")
        raise SystemExit(2) from exc


def _serve(settings: Settings, config: Path | None = None) -> int:
    import signal

    import uvicorn

    from server import logs
    from server.app import create_app, drain, listening
    from server.engine.calls import EngineDied
    from server.http.connection import BoundedHeads, DrainingServer, connections_for, raise_descriptors
    from server.http.heap import keep_large_blocks_apart
    from server.http.reload import take_over

    keep_large_blocks_apart()
    logs.configure(settings.log_format, settings.log_level)
    logs.configure_children(settings.log_format, settings.log_level)
    # vLLM must not ask a hub about a model that is here, nor report usage.
    if Path(settings.model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    died: list[EngineDied] = []

    def on_death(exc: EngineDied) -> None:
        died.append(exc)
        server.should_exit = True

    app = create_app(settings, on_death=on_death)

    def on_hangup(*_: object) -> None:
        if app.state.services is not None:
            take_over(app.state.services, partial(type(settings).load, config))

    signal.signal(signal.SIGHUP, on_hangup)
    BoundedHeads.seconds = settings.client_timeout
    BoundedHeads.limit = connections_for(raise_descriptors())
    server = DrainingServer(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            loop="uvloop",
            http=BoundedHeads,
            ws="none",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=5,
            server_header=False,
        ),
        partial(drain, app),
        partial(listening, app),
    )
    server.run()
    return 1 if died or not server.started else 0


def main() -> None:
    """Entry point of the ``loraplex`` script.

    SIGPIPE stays ignored: its default would end a server that writes to a client who has just gone. Whoever
    reads no further than some lines of the output is met here instead.
    """
    try:
        cli()
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()

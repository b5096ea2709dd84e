"""``loraplex bench``: load for one's own server, with one's own keys and models.

The load is open: requests come when they come, however slow the answers are, so that a server which is too
slow shows it in its times and not in fewer requests. The clients of a ``--workload`` wait for their answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from server.cli.client import RemoteError
from server.cli.command import KEY_VARIABLES, say

# Those of ``server.cli.bench_workloads``, which is not imported for a command's help.
Workload = Literal[
    "overhead", "cold", "storm", "churn", "noisy", "limited", "starvation", "hog", "weights", "overload"
]


def bench(
    context: typer.Context,
    url: Annotated[str, typer.Argument(help="Where the server is.", show_default=False)],
    model: Annotated[
        list[str] | None, typer.Option(help="Once for each; all of the keys' models if not given.")
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(envvar=KEY_VARIABLES[0], help="A customer's key; once for each.", show_default=False),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, readable=True, help="A file with a key in each line."),
    ] = None,
    workload: Annotated[
        Workload | None,
        typer.Option(
            help="One of `make bench`'s, each phase with clients for --seconds; without --rate and --burst."
        ),
    ] = None,
    rate: Annotated[float, typer.Option(min=0.01, help="Requests a second.")] = 2.0,
    seconds: Annotated[float, typer.Option(min=0.1, help="For how long.")] = 30.0,
    burst: Annotated[float, typer.Option(min=0, help="0: evenly; 1: by chance; more: in bursts.")] = 1.0,
    skew: Annotated[float, typer.Option(min=0, help="Of Zipf's law over the models; 0: all alike.")] = 1.0,
    prompt_words: Annotated[int, typer.Option(min=1, help="Words of a prompt.")] = 100,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    seed: Annotated[int, typer.Option(help="The same load again with the same one.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Write an HTML page with the times.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Load a server with one's own keys and models, and print what its clients felt."""
    from server.cli import bench_report as report
    from server.cli.bench_load import Load
    from server.cli.bench_run import run, run_workload

    given = [*(key or ()), *(keys.read_text().split() if keys else ())]
    load = Load(rate, seconds, burst, skew, prompt_words, max_tokens, seed)
    try:
        if not given:
            raise RemoteError("no_key", "Give customers' keys with --key, --keys or LORAPLEX_KEY.")
        if workload is not None and (dropped := _given(context, "rate", "burst")):
            said = f"--workload has its own arrivals; leave out {' and '.join(dropped)}."
            raise RemoteError("not_with_workload", said)
        if workload is None:
            shots = run(url, given, model or [], load)
            rows = report.rows(shots)
        else:
            phases = run_workload(url, given, model or [], load, workload)
            shots = sorted((shot for one in phases.values() for shot in one), key=lambda shot: shot.began)
            rows = report.phase_rows(phases)
    except RemoteError as exc:
        say("red", f"{exc.code}:", str(exc))
        raise SystemExit(1) from exc
    if as_json:
        print(json.dumps({"rows": rows, "requests": [report.as_json(shot) for shot in shots]}, indent=2))
    else:
        report.show(rows)
    if plot is not None:
        plot.write_text(report.page(url, rows, shots), encoding="utf-8")
    raise SystemExit(0 if any(shot.error is None for shot in shots) else 1)


def _given(context: typer.Context, *names: str) -> list[str]:
    """Those of the options that were typed."""
    sources = ((name, context.get_parameter_source(name)) for name in names)
    return [f"--{name}" for name, source in sources if source is not None and source.name == "COMMANDLINE"]

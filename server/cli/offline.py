"""What the command line does without a server, for people: tables on the terminal, and exit codes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adapters.errors import AdapterRejected
from adapters.inspection.base_model import dtype_of, read_base
from adapters.inspection.logprobs import PROMPTS
from adapters.model import CONFIG_FILE, BaseModel, Coverage, Manifest, ranges
from adapters.offline.doctor import Diagnosis, diagnose
from adapters.offline.merge import Merge, MergeError, Probe

OK, REFUSED, FAILED = 0, 1, 2


def doctor(
    adapter: Path,
    base_dir: Path | None,
    *,
    max_rank: int,
    dtype: str | None,
    server: Mapping[str, Any] | None = None,
    as_json: bool,
) -> int:
    """Prints what an upload of ``adapter`` would be answered; 0 accepted, 1 refused, 2 not to be told.

    ``server`` is a running one's ``/admin/v1/server``, or ``served_to`` a customer: its rank and dtype hold,
    its base must be this one.
    """
    try:
        if server is not None:
            max_rank, dtype = server["capacity"]["max_lora_rank"], server["dtype"]
            base_dir = base_dir or _source_of(server)
        if base_dir is None:
            raise ValueError("name the base model's folder with --base, or ask a server with --server")
        base = read_base_quietly(base_dir, max_rank)
        if server is not None and base.fingerprint != server["base"]["fingerprint"]:
            raise ValueError(f"{base_dir} is not the base that the server has, {server['base']['name']}")
        if not adapter.is_dir():
            raise FileNotFoundError(f"there is no folder {adapter}")
        diagnosis = diagnose(adapter, base, serving_dtype=dtype or dtype_of(base_dir))
    except (OSError, ValueError) as error:
        return fail(error)
    if as_json:
        print(json.dumps(diagnosis.as_json(), indent=2))
    else:
        _show(adapter, diagnosis)
    return OK if diagnosis.error is None else REFUSED


def served_to(me: Mapping[str, Any]) -> dict[str, Any]:
    """What ``/v1/me`` says of what ``/admin/v1/server`` says: all but where the base lies."""
    base = me["base"]
    about = {"name": base["name"], "fingerprint": base["fingerprint"]}
    return {"base": about, "capacity": {"max_lora_rank": base["max_lora_rank"]}, "dtype": base["dtype"]}


def _source_of(server: Mapping[str, Any]) -> Path:
    """The folder of a server's base, if this is its machine; ValueError."""
    if "source" not in server["base"]:
        raise ValueError(
            f"where {server['base']['name']} lies is not visible with a customer's key;"
            " name your copy's folder with --base"
        )
    folder = Path(server["base"]["source"] or "")
    if server["base"]["source"] and folder.is_dir():
        return folder
    raise ValueError(f"{server['base']['name']} does not lie on this machine; name its folder with --base")


def merge(
    base_dir: Path,
    adapter: Path,
    out: Path,
    *,
    verify: bool,
    tolerance: float,
    dequantize: str | None = None,
) -> int:
    """Writes base and adapter as one checkpoint to ``out``; 0 done, 1 refused or not the same, 2 failed."""
    console = Console()
    try:
        # The rank is the server's limit, and a merged model has none.
        base = read_base_quietly(base_dir, max_rank=1 << 30)
        with Merge(base_dir, base, adapter, out, dequantize=dequantize) as merging:
            console.print(f"{merging.run()} weights changed")
            if verify:
                probes = merging.verify(list(PROMPTS))
                console.print(_probe_table(probes))
                worst = max(probe.log_prob for probe in probes)
                if not worst <= tolerance:
                    console.print(
                        f"[red]not kept[/red]: a log-probability differs by {worst:.4g}, not {tolerance}"
                    )
                    return REFUSED
            merging.keep()
    except AdapterRejected as error:
        console.print(f"[red]refused[/red] {error.code}: {escape(error.message)}")
        return REFUSED
    except ImportError as error:
        return fail(ImportError(f"{error}; install it, or skip the comparison with --no-verify"))
    except (OSError, ValueError, MergeError) as error:
        return fail(error)
    console.print(f"[green]written[/green] {escape(str(out))}")
    return OK


def write_dequantized(base_dir: Path, out: Path) -> int:
    """Writes a quantized base as an ordinary checkpoint in bfloat16 to ``out``; 0 done, 2 failed."""
    from adapters.offline.dequantize import dequantize

    try:
        layers = dequantize(base_dir, out)
    except (OSError, ValueError) as error:
        return fail(error)
    Console().print(f"[green]written[/green] {escape(str(out))}: {layers} layers in bfloat16")
    return OK


def make_probes(base_dir: Path, adapter: Path, out: Path, *, prompts: list[str], tolerance: float) -> int:
    """Writes ``probes.json`` to ``out``, by default with the server's own prompts; 0 done, 2 failed."""
    try:
        read_base_quietly(base_dir, max_rank=1 << 30)
        if not (adapter / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{adapter} holds no {CONFIG_FILE}")
        from adapters.offline.reference import golden

        made = golden(base_dir, adapter, prompts or PROMPTS, tolerance=tolerance)
        out.write_text(made.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except ImportError as error:
        return fail(ImportError(f"{error}; this runs where adapters are trained, with transformers and peft"))
    except (OSError, ValueError) as error:
        return fail(error)
    Console().print(f"[green]written[/green] {escape(str(out))}: {len(made.probes)} prompts")
    return OK


def read_base_quietly(folder: Path, max_rank: int) -> BaseModel:
    """The base model in ``folder``; a path that is none must not be taken for a hub's id."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json of a base model")
    return read_base(folder, max_lora_rank=max_rank)


def fail(error: Exception) -> int:
    Console(stderr=True).print(f"[red]{escape(str(error))}[/red]")
    return FAILED


def _show(adapter: Path, diagnosis: Diagnosis) -> None:
    console = Console()
    base, manifest = diagnosis.base, diagnosis.manifest
    if diagnosis.error is not None:
        console.print(f"[red]refused[/red] {diagnosis.error.code}: {escape(diagnosis.error.message)}")
    if manifest is not None:
        console.print(_table(adapter, manifest, base))
        for note in manifest.conversions:
            console.print(f"[cyan]converted[/cyan] {escape(note)}")
        for warning in manifest.warnings:
            console.print(f"[yellow]warning[/yellow] {escape(warning)}")
        console.print(f"[green]accepted[/green] rank {manifest.rank}, {manifest.size_bytes} bytes")
    console.print(f"base {escape(base.name)}, fingerprint {base.fingerprint}")


def _probe_table(probes: list[Probe]) -> Table:
    table = Table(title="merged model against base + PEFT, in float32")
    table.add_column("prompt")
    for heading in ("adapter's effect (KL)", "merged (KL)", "largest change in log-probability"):
        table.add_column(heading, justify="right")
    for probe in probes:
        numbers = (probe.effect, probe.error, probe.log_prob)
        table.add_row(escape(probe.prompt), *(f"{number:.2e}" for number in numbers))
    return table


def _table(adapter: Path, manifest: Manifest, base: BaseModel) -> Table:
    table = Table(title=escape(f"{adapter.name} on {base.name}"))
    for heading in ("module", "layers", "of", "rank", "scaling", "norm of the change"):
        table.add_column(heading, justify="left" if heading in ("module", "layers") else "right")
    for row in manifest.coverage:
        table.add_row(*_cells(row))
    return table


def _cells(row: Coverage) -> tuple[str, ...]:
    spans = [
        f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        for low, high in (row.rank, row.scaling, row.norm)
    ]
    return row.module, ranges(row.layers), str(row.available), *spans

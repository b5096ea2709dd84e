"""A quantized base and adapters on it, on the real engine, against what its few bits mean in float32."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from server.app import create_app
from server.settings import Settings
from tests.families.measure import apart_by_force, settings_of
from tests.support.quantized import make_plain, quantize
from tests.support.site import serving
from tests.support.trainer import breed
from tests.support.truth import answer
from tests.support.zoo import LINEAR, Specimen

ADAPTERS = {
    "every linear layer": Specimen({"target_modules": LINEAR}),
    "attention": Specimen({"target_modules": ["q_proj", "v_proj"]}),
}
# What is measured on a base that is not quantized, in the type of the others: the type's own rounding.
PLAIN = "not quantized"


@dataclass(frozen=True)
class QuantizedRow:
    """The largest difference between log-probabilities of the same tokens: of the base, and of adapters.

    ``effect`` is how far the adapters move them; ``refused`` why the start is.
    """

    kind: str
    dtype: str
    base: float = 0.0
    adapters: float = 0.0
    effect: float = 0.0
    refused: str = ""


async def measure_quantized(kind: str, root: Path, *, dtype: str = "bfloat16") -> QuantizedRow:
    """Starts an engine on a tiny Llama in the format ``kind``."""
    torch.set_num_threads(1)
    plain = make_plain(root / "plain")
    reference = plain if kind == PLAIN else quantize(root / "plain", kind, root / "base")
    if kind == PLAIN:
        (root / "plain").rename(root / "base")
        reference = type(plain)(root / "base")
    settings = settings_of(root, dtype)
    if refusal := await _refusal(settings):
        return QuantizedRow(kind, dtype, refused=refusal)
    bare = answer(reference.fresh())
    truths = {name: breed(reference, name, one, root / name) for name, one in ADAPTERS.items()}
    async with serving(create_app(settings)) as site:
        key = await site.tenant("t")
        base = await apart_by_force(site, key, site.services.engine.base.name, bare)
        found, effect = [], []
        for number, (name, truth) in enumerate(truths.items()):
            assert truth is not None
            uploaded = await site.upload("t", f"a{number}", root / name)
            assert uploaded.status_code == 201, uploaded.text
            found.append(await apart_by_force(site, key, f"a{number}", truth))
            effect.append(await apart_by_force(site, key, site.services.engine.base.name, truth))
    return QuantizedRow(kind, dtype, base, max(found), min(effect))


async def _refusal(settings: Settings) -> str:
    """Why this base is refused before it is loaded; empty where it is not."""
    from server.engine import bases

    try:
        await asyncio.to_thread(bases.refuse_what_cannot_load, settings)
        await asyncio.to_thread(_config_of, settings)
    except ValueError as error:
        return str(error).removeprefix("MODEL: ").split("Value error, ")[-1].split(". ")[0]
    return ""


def _config_of(settings: Settings) -> None:
    from server.engine.arguments import Slots, vllm_arguments

    vllm_arguments(settings, Slots(1, 1))[1].create_engine_config()


def quantized_table(rows: Sequence[QuantizedRow]) -> str:
    lines = [
        "| base | served in | base's difference | adapters' difference | adapters' effect |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row.refused:
            lines.append(f"| {row.kind} | {row.dtype} | the start is refused: {row.refused} | | |")
        else:
            lines.append(
                f"| {row.kind} | {row.dtype} | {row.base:.1e} | {row.adapters:.1e} | {row.effect:.1e} |"
            )
    return "\n".join(lines) + "\n"

"""One family: a server on a tiny base of it, adapters by PEFT, and how far their answers are apart."""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch

from server.app import create_app
from server.engine.engine import Engine
from server.inference.dialects.registry import DIALECTS
from server.settings import Settings
from tests.support.families import FAMILIES, Family, adapters
from tests.support.site import ADMIN_KEY, SERVICE_KEY, Site, bearer, serving
from tests.support.trainer import SIZES, breed, build
from tests.support.truth import PROMPT, Truth, answer, echoed, heard, words

TOLERANCE = 1e-2
# A base that answers in place of an adapter must not pass for it: the adapter moves the answer by at least so
# many times what the server is off.
LEAST_EFFECT = 10


@dataclass(frozen=True)
class Row:
    """``difference``: the largest between log-probabilities of the server and of PEFT. ``wrong``: why not.

    ``refused`` is why the start is, and ``refusals`` has the codes of adapters that are."""

    title: str
    tried: int
    difference: float
    wrong: dict[str, str]
    refused: str = ""
    refusals: dict[str, str] = field(default_factory=dict)


async def measure(name: str, root: Path) -> Row:
    """Starts an engine on the family ``name``, in ``root``, and tries all its adapters."""
    family = FAMILIES[name]
    torch.set_num_threads(1)
    base = build(family.make_config(SIZES), root / "base")
    if family.refused:
        return await _refused(family, root)
    tried = adapters(family)
    folders = {kind: root / f"adapter-{i}" for i, kind in enumerate(tried)}
    differences: list[float] = []
    wrong: dict[str, str] = {}
    refusals: dict[str, str] = {}
    async with serving(create_app(settings_of(root))) as site:
        key, bare = await site.tenant("t"), answer(base.fresh())
        try:
            differences.append(_distance(await _ask(site, key, site.services.engine.base.name), bare))
        except ValueError as error:
            wrong["the base alone"] = str(error)
        for kind, one in tried.items():
            truth = await asyncio.to_thread(breed, base, kind, one, folders[kind])
            try:
                uploaded = await site.upload("t", folders[kind].name, folders[kind])
                if one.code and uploaded.json().get("error", {}).get("code") == one.code:
                    refusals[kind] = one.code
                    continue
                assert truth is not None, f"{kind} is to be refused: {uploaded.text[:300]}"
                if uploaded.status_code != 201:
                    raise ValueError(uploaded.text[:300])
                apart = _distance(await _ask(site, key, folders[kind].name), truth)
                differences.append(apart)
                if truth.ids == bare.ids and truth.apart(bare) < LEAST_EFFECT * apart:
                    raise ValueError("the base says the same")
            except ValueError as error:
                wrong[kind] = str(error)
    return Row(family.title, len(tried), max(differences, default=float("inf")), wrong, refusals=refusals)


async def _refused(family: Family, root: Path) -> Row:
    """Of a family that vLLM has no LoRA for: the start fails; a server would end its process with it."""
    try:
        engine = await Engine.start(settings_of(root), DIALECTS)
    except Exception:  # whatever becomes of the engine's own exception on its way here; its log has it
        return Row(family.title, 0, 0.0, {}, refused=family.refused)
    await engine.stop()
    return Row(family.title, 0, 0.0, {"the start": "vLLM starts on it now: try its adapters"})


def settings_of(root: Path, dtype: str = "float32") -> Settings:
    """Of a server on ``root/base``, its tokenizer beside it."""
    return Settings(
        model=str(root / "base"),
        data_dir=root / "data",
        admin_key=ADMIN_KEY,
        service_key=SERVICE_KEY,
        gpu_slots=4,
        host_slots=16,
        max_lora_rank=64,
        max_model_len=128,
        engine_args={"dtype": dtype, "max_num_seqs": 4, "tokenizer": str(root / "base" / "tokenizer")},
        log_format="text",
        log_level="warning",
    )


async def _ask(site: Site, key: str, model: str) -> Truth:
    response: httpx.Response = await site.http.post(
        "/v1/completions", json=echoed(model), headers=bearer(key)
    )
    if response.status_code != 200:
        raise ValueError(response.text[:300])
    return heard(response.json())


async def apart_by_force(site: Site, key: str, model: str, truth: Truth) -> float:
    """The largest difference between log-probabilities of the tokens of ``truth``, which the model is given.

    So it goes on where rounding makes another token the likeliest.
    """
    ids = [*PROMPT, *truth.ids]
    body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    response: httpx.Response = await site.http.post("/v1/completions", json=body, headers=bearer(key))
    response.raise_for_status()
    said = response.json()["choices"][0]["logprobs"]["token_logprobs"][len(PROMPT) : len(ids)]
    return max(abs(one - other) for one, other in zip(said, truth.log_probs, strict=True))


def _distance(got: Truth, truth: Truth) -> float:
    """ValueError where the tokens differ or the log-probabilities are too far apart."""
    if got.ids != truth.ids:
        raise ValueError(f"said {words(got.ids)} instead of {words(truth.ids)}")
    apart = got.apart(truth)
    if apart > TOLERANCE:
        raise ValueError(f"log-probabilities are {apart:.3g} apart")
    return apart


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| family | adapters | largest difference | not served as trained |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        if row.refused:
            lines.append(f"| {row.title} | | | the start is refused: vLLM's {row.refused} |")
            continue
        why_not = row.wrong | {kind: f"refused, `{code}`" for kind, code in row.refusals.items()}
        wrong = "; ".join(f"{kind}: {why[:80]}" for kind, why in why_not.items()).replace("|", "\\|")
        lines.append(f"| {row.title} | {row.tried} | {row.difference:.1e} | {wrong} |")
    return "\n".join(lines) + "\n"

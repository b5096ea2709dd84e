"""QLoRA from end to end: trained on four bits by PEFT and bitsandbytes, served on bases that vLLM has.

The training is a real one on a CPU: nf4 with double quantization, bfloat16 compute, an adapter on every
linear layer that learns eight sequences by heart. What it then says of them, token by token, goes along as
``probes.json``, and the server's own comparison tells how far it is from that.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters.inspection.golden import Golden, GoldenProbe
from adapters.model import CONFIG_FILE, PROBES_FILE, WEIGHTS_FILE
from adapters.offline.dequantize import dequantize
from server.app import create_app
from tests.families.measure import settings_of
from tests.support.quantized import make_plain, quantize
from tests.support.site import serving
from tests.support.trainer import VOCABULARY

QLORA = "qlora"
BASES = {
    "what the four bits mean, written out": "dequantized",
    "the original, bfloat16": "plain",
    "the original as w4a16": "w4a16",
}
STEPS, LENGTH, SEQUENCES = 60, 24, 8


@dataclass(frozen=True)
class QloraRow:
    """Log-probabilities of the sequences: the largest and the mean difference to the training's.

    ``base`` is the largest of the base alone to the trained-on base alone.
    """

    served: str
    largest: float
    mean: float
    base: float
    wrong: str = ""


async def measure_qlora(root: Path) -> tuple[list[QloraRow], str]:
    """One row a base, and what the training did, in a sentence."""
    torch.set_num_threads(1)
    plain = make_plain(root / "plain")
    quantized = _quantized(plain.folder)
    quantized.save_pretrained(root / "nf4")
    bare = _says(quantized)
    trained, losses = _train(quantized)
    taught = _says(trained)
    trained.save_pretrained(root / "adapter")
    dequantize(root / "nf4", root / "dequantized")
    quantize(root / "plain", "w4a16", root / "w4a16")
    rows = []
    for title, folder in BASES.items():
        rows.append(await _measure(title, root / folder, root, bare, taught))
    moved = max((one - other).abs().max().item() for one, other in zip(taught, bare, strict=True))
    return (
        rows,
        f"{STEPS} steps, loss {losses[0]:.2g} to {losses[-1]:.2g}; the adapter moves them by {moved:.2g}",
    )


def _quantized(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=bits, device_map="cpu"
    )


def _sequences() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(11))


def _train(model: Any) -> tuple[Any, list[float]]:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    torch.manual_seed(5)
    prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(prepared, config).train()
    steps = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=5e-3)
    losses = []
    for _ in range(STEPS):
        loss = adapted(input_ids=_sequences(), labels=_sequences()).loss
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(float(loss))
    return adapted.eval(), losses


def _says(model: Any) -> list[torch.Tensor]:
    """The log-probability of each token of each sequence after the first."""
    found = []
    with torch.inference_mode():
        for ids in _sequences():
            steps = torch.log_softmax(model(ids[None]).logits[0, :-1].float(), dim=-1)
            found.append(steps.gather(1, ids[1:, None]).squeeze(1))
    return found


async def _measure(
    title: str, base: Path, root: Path, bare: list[torch.Tensor], taught: list[torch.Tensor]
) -> QloraRow:
    room = root / base.name.replace("/", "-") / "site"
    shutil.copytree(base, room / "base", ignore=lambda *_: ["site"])
    if not (room / "base" / "tokenizer").exists():
        shutil.copytree(root / "plain" / "tokenizer", room / "base" / "tokenizer")
    async with serving(create_app(settings_of(room, "bfloat16"))) as site:
        key = await site.tenant("t")
        name = site.services.engine.base.name
        alone = await _served(site, key, name)
        files = {one: (root / "adapter" / one).read_bytes() for one in (CONFIG_FILE, WEIGHTS_FILE)}
        files[PROBES_FILE] = _probes(taught).model_dump_json().encode()
        uploaded = await site.admin.post("/admin/v1/tenants/t/adapters/a/versions", files=files)
        if uploaded.status_code != 201:
            return QloraRow(title, 0.0, 0.0, 0.0, uploaded.text[:300])
        largest = uploaded.json()["report"]["golden"]["largest_difference"]
        with_adapter = await _served(site, key, "a")
    apart = [abs(a - b) for a, b in zip(with_adapter, torch.cat(taught).tolist(), strict=True)]
    of_base = [abs(a - b) for a, b in zip(alone, torch.cat(bare).tolist(), strict=True)]
    return QloraRow(title, largest, sum(apart) / len(apart), max(of_base))


def _probes(taught: list[torch.Tensor]) -> Golden:
    """With the widest tolerance there is: here the difference is asked for, not a verdict."""
    probes = [
        GoldenProbe(prompt=ids, log_probs=[min(0.0, one) for one in said.tolist()])
        for ids, said in zip(_sequences().tolist(), taught, strict=True)
    ]
    return Golden(tolerance=10, probes=probes)


async def _served(site: Any, key: str, model: str) -> list[float]:
    from tests.support.site import bearer

    async def one(ids: list[int]) -> list[float]:
        body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
        response = await site.http.post("/v1/completions", json=body, headers=bearer(key))
        response.raise_for_status()
        said: list[float] = response.json()["choices"][0]["logprobs"]["token_logprobs"][1:LENGTH]
        return said

    found = await asyncio.gather(*map(one, _sequences().tolist()))
    return [number for numbers in found for number in numbers]


def qlora_table(rows: Sequence[QloraRow], training: str) -> str:
    lines = [
        f"Trained: {training}.",
        "",
        "| served on | largest difference to training | mean difference | of the bases alone |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        if row.wrong:
            lines.append(f"| {row.served} | {row.wrong} | | |")
        else:
            lines.append(f"| {row.served} | {row.largest:.2g} | {row.mean:.2g} | {row.base:.2g} |")
    return "\n".join(lines) + "\n"

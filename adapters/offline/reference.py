"""What the training side computes: the base with the adapter as PEFT runs it, without a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from adapters.inspection.golden import Golden, GoldenProbe
from adapters.offline.dequantize import load


def golden(base_dir: Path, adapter: Path, prompts: Sequence[str], *, tolerance: float) -> Golden:
    """The log-probabilities of ``prompts`` in float32, as ``probes.json`` has them.

    Of a quantized base: of what its few bits mean. Needs transformers, PEFT, and memory for the base in
    float32. ValueError for a prompt of one token, and what those two raise.
    """
    from peft import PeftModel
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_dir, local_files_only=True)
    model = PeftModel.from_pretrained(load(base_dir), adapter).eval()
    probes = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        if len(ids) < 2:
            raise ValueError(f"the prompt {prompt!r} has fewer than two tokens")
        with torch.inference_mode():
            logits = model(torch.tensor([ids], device=model.device)).logits[0].float()
        steps = torch.log_softmax(logits[:-1], dim=-1)
        of_tokens = steps.gather(1, torch.tensor(ids[1:], device=steps.device).unsqueeze(1)).squeeze(1)
        probes.append(GoldenProbe(prompt=ids, log_probs=of_tokens.tolist(), text=prompt))
    return Golden(tolerance=tolerance, probes=probes)

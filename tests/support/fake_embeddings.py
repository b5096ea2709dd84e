"""The fake engine's embeddings, told as vLLM tells them."""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from adapters.model import WEIGHTS_FILE
from server.engine.calls import Call

# A kind of call -> what a base makes that answers it.
POOLED = {"embedding": "embeddings", "classification": "labels", "score": "labels"}


def check(request: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    if getattr(request, "dimensions", None) is not None:
        raise VLLMValidationError("Model does not support Matryoshka embeddings; dimensions must be unset.")


def document(call: Call, request: Any, vectors: Sequence[Sequence[float]], tokens: int) -> dict[str, Any]:
    """``vectors`` at length 1, in the order of the inputs."""
    data = []
    for index, vector in enumerate(vectors):
        length = math.hypot(*vector)
        unit = [number / length for number in vector]
        encoded = base64.b64encode(array("f", unit).tobytes()).decode()
        shown = encoded if request.encoding_format == "base64" else unit
        data.append({"index": index, "object": "embedding", "embedding": shown})
    return {
        "id": f"embd-{call.id}",
        "object": "list",
        "created": 0,
        "model": call.public_model,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    }


def pooled_prompts(request: Any) -> Any:
    """What a pooled request is answered for; of two texts, one after the other."""
    if hasattr(request, "documents"):
        return [f"{q} {d}" for q, d in zip(request.queries, request.documents, strict=True)]
    return request.input


def scored(call: Call, vectors: Sequence[Sequence[float]], request: Any, tokens: int) -> dict[str, Any]:
    """One number for each pair, as a probability unless that was not asked for."""
    raw = [vector[0] for vector in vectors]
    shown = raw if request.use_activation is False else [1 / (1 + math.exp(-one)) for one in raw]
    return {
        "id": f"score-{call.id}",
        "object": "list",
        "created": 0,
        "model": call.public_model,
        "data": [{"index": i, "object": "score", "score": score} for i, score in enumerate(shown)],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    }


def labels_of(folder: Path) -> int | None:
    """How many the adapter's own head has; None where it has none."""
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as weights:
        heads = [name for name in weights.keys() if name.endswith("score.weight")]  # noqa: SIM118
        return int(weights.get_slice(heads[0]).get_shape()[0]) if heads else None


def classified(
    call: Call, request: Any, vectors: Sequence[Sequence[float]], tokens: int, labels: int
) -> dict[str, Any]:
    """``labels`` scores for each input, as probabilities unless those were not asked for."""
    data = []
    for index, vector in enumerate(vectors):
        scores = [vector[i % len(vector)] for i in range(labels)]
        if request.use_activation is not False:
            whole = sum(map(math.exp, scores))
            scores = [math.exp(score) / whole for score in scores]
        best = max(range(labels), key=scores.__getitem__)
        data.append({"index": index, "label": f"LABEL_{best}", "probs": scores, "num_classes": labels})
    return {
        "id": f"classify-{call.id}",
        "object": "list",
        "created": 0,
        "model": call.public_model,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    }

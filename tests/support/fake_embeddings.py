"""The fake engine's embeddings, told as vLLM tells them."""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Sequence
from typing import Any

from server.engine.calls import Call


def check(request: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    if request.dimensions is not None:
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

"""Which quantized bases the engine here cannot run, said before it loads one.

vLLM finds some of them out while it loads, in a process whose log has the reason, and some in the middle of
the first forward pass. The lists are of 0.32 and its CPU build.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from adapters.inspection.quantized import method_of

# On no platform.
_NOWHERE = ("bitsandbytes", "gguf")
_FLOAT32 = ("float32", "float")


def refuse(quantization: Mapping[str, Any], *, dtype: str, on_cpu: bool, amx: bool) -> None:
    """ValueError with the reason and the cure where vLLM has no kernel for the base.

    ``dtype`` is what ENGINE_ARGS say, or "auto". ``amx``: whether the processor multiplies tiles.
    """
    method = method_of(quantization)
    if method in _NOWHERE:
        raise ValueError(
            f"MODEL: the base is quantized by {method}, which vLLM does not serve on any machine. Write it"
            " out with `loraplex dequantize --base … --out …` and serve that: the weights are the same."
        )
    if not on_cpu:
        return
    weights = list(_weights(quantization))
    if any(_integers(one) == 4 for one in weights) and dtype in _FLOAT32:
        raise ValueError(
            f"MODEL: weights of four bits ({method}) are multiplied in bfloat16 or float16 on a CPU, and"
            ' ENGINE_ARGS say float32. Say "bfloat16" there, or nothing.'
        )
    if any(_integers(one) == 8 and one["packed"] for one in weights):
        raise ValueError(
            f"MODEL: this CPU build has no kernel for packed weights of eight bits ({method}), only of four."
            " Serve another quantization (w8a8 runs), or write it out with `loraplex dequantize`."
        )
    if not amx and any(one["type"] == "float" and one["strategy"] != "channel" for one in weights):
        raise ValueError(
            "MODEL: FP8 with a scale for each tensor or block needs a processor with AMX here, and this one"
            " has none; with a scale for each row (compressed-tensors) it runs. Or write it out with"
            " `loraplex dequantize`."
        )


def _integers(weights: Mapping[str, Any]) -> int | None:
    """Of how many bits, where they are integers."""
    return int(weights["num_bits"]) if weights["type"] == "int" else None


def _weights(quantization: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """How the layers' weights are stored, in compressed-tensors' words, and whether many in one number."""
    method = method_of(quantization)
    if method in ("gptq", "awq", "auto_gptq", "auto_awq"):
        bits = quantization.get("bits") or quantization.get("w_bit") or 4
        yield {"num_bits": bits, "type": "int", "strategy": "group", "packed": True}
    elif method == "fp8":
        strategy = "block" if quantization.get("weight_block_size") else "tensor"
        yield {"num_bits": 8, "type": "float", "strategy": strategy, "packed": False}
    elif method == "compressed-tensors":
        groups = quantization.get("config_groups") or {}
        for group in groups.values() if isinstance(groups, dict) else ():
            weights = group.get("weights") if isinstance(group, dict) else None
            if isinstance(weights, dict):
                form = group.get("format") or quantization.get("format")
                yield {
                    "num_bits": weights.get("num_bits", 8),
                    "type": weights.get("type", "int"),
                    "strategy": weights.get("strategy") or "tensor",
                    "packed": form == "pack-quantized",
                }

"""The kernels of this CPU build for quantized bases, with adapters, against what the few bits mean.

By layers of vLLM's own model, without an engine; ``make families`` has whole answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.support.quantized import make_plain, quantize
from tests.support.trainer import breed
from tests.support.vllm_models import activate, loaded, schedule
from tests.support.zoo import Specimen

# Kind -> the largest relative difference of a layer's output. Where inputs are rounded to eight bits, too,
# it is that rounding; else it is that of the serving type.
RUN = {
    ("w4a16", "bfloat16"): 0.01,
    ("w4a16, asymmetric", "float16"): 0.002,
    ("GPTQ", "bfloat16"): 0.01,
    ("AWQ", "float16"): 0.002,
    ("w8a8", "float32"): 0.02,
    ("FP8 by channel", "bfloat16"): 0.06,
}
GROUPS = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "self_attn.o_proj": ("o_proj",),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.down_proj": ("down_proj",),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plain(tmp_path_factory.mktemp("plain") / "base").folder


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize(("kind", "dtype"), RUN)
def test_an_adapter_on_a_quantized_layer_adds_what_peft_adds(
    kind: str, dtype: str, plain: Path, tmp_path: Path
) -> None:
    meant = quantize(plain, kind, tmp_path / "base")
    breed(meant, kind, Specimen({"target_modules": "all-linear"}), tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(meant.fresh(), tmp_path / "adapter").base_model.model.model
    with torch.inference_mode(), loaded(tmp_path / "base", dtype, tmp_path) as tables:
        activate(tables, tmp_path / "adapter")
        schedule(tables, [1, 0, 1, 0, 0])
        for group, parts in GROUPS.items():
            layer = tables.modules[f"model.layers.1.{group}"]
            x = torch.randn(5, layer.input_size).to(getattr(torch, dtype))
            got = layer(x)[0].float()
            within = adapted.layers[1].get_submodule(group.split(".")[0])
            of_parts = [getattr(within, part) for part in parts]
            with_adapter = torch.cat([part(x.float()) for part in of_parts], 1)
            bare = torch.cat([part.base_layer(x.float()) for part in of_parts], 1)
            assert relative(got[::2][:2], with_adapter[::2][:2]) < RUN[kind, dtype]
            assert relative(got[1::2], bare[1::2]) < RUN[kind, dtype]
            assert relative(with_adapter, bare) > 4 * RUN[kind, dtype]


@pytest.mark.parametrize("kind", ["FP8 by tensor", "FP8 by block", "GPTQ, desc_act"])
def test_the_others_are_refused_by_vllm_too(kind: str, plain: Path, tmp_path: Path) -> None:
    """What is refused before the start would not start: FP8 per tensor and block here, desc_act anywhere."""
    if "FP8" in kind and torch.cpu._is_amx_tile_supported():
        pytest.skip("this processor has AMX, and vLLM kernels for it")
    quantize(plain, kind, tmp_path / "base")
    failed: Any = pytest.raises((ValueError, RuntimeError), match=r"desc_act|AMX|static_scaled_fp8_quant")
    with failed, loaded(tmp_path / "base", "bfloat16", tmp_path):
        pass


def test_four_bits_in_float32_end_at_the_first_product(plain: Path, tmp_path: Path) -> None:
    quantize(plain, "w4a16", tmp_path / "base")
    with loaded(tmp_path / "base", "float32", tmp_path) as tables:
        layer = tables.modules["model.layers.1.self_attn.o_proj"]
        schedule(tables, [0])
        with pytest.raises(NotImplementedError, match="Float"):
            layer(torch.randn(1, layer.input_size))

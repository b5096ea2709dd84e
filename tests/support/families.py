"""Tiny random bases of the families that people train adapters on, and the adapters that each is tried with.

Sizes are those of ``trainer``; what makes a family's forward pass its own (windows, biases, soft caps, fused
layers, multipliers, tied embeddings) is as it is in the real ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import transformers

from tests.support.zoo import LINEAR, Specimen

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32, "layer_types": _WINDOWS}


@dataclass(frozen=True)
class Family:
    """``config`` names a class of transformers; ``options`` go over the sizes of ``trainer``.

    ``refused`` is why vLLM does not start on it with LoRA. ``vocabulary``: whether its class serves adapters
    on the head and the embedding.
    """

    title: str
    config: str
    options: Mapping[str, Any]
    modules: tuple[str, ...]
    refused: str = ""
    vocabulary: bool = False

    def make_config(self, sizes: Mapping[str, Any]) -> Any:
        return getattr(transformers, self.config)(**{**sizes, "pad_token_id": 0, **self.options})


_SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _of(
    title: str,
    config: str,
    modules: tuple[str, ...] = _SPLIT,
    *,
    refused: str = "",
    vocabulary: bool = False,
    **options: Any,
) -> Family:
    return Family(title, config, MappingProxyType(options), modules, refused, vocabulary)


FAMILIES = {
    "llama3": _of(
        "Llama 3", "LlamaConfig", vocabulary=True, tie_word_embeddings=True, rope_parameters=_LLAMA3_ROPE
    ),
    "mistral": _of("Mistral, sliding windows", "MistralConfig", sliding_window=8, tie_word_embeddings=False),
    "qwen2": _of("Qwen2, biases", "Qwen2Config", tie_word_embeddings=True),
    "qwen3": _of("Qwen3", "Qwen3Config", vocabulary=True, head_dim=32, tie_word_embeddings=True),
    "gemma2": _of("Gemma 2, soft caps, windows", "Gemma2Config", **_GEMMA),
    "gemma3": _of("Gemma 3, windows", "Gemma3TextConfig", **_GEMMA),
    "phi3": _of(
        "Phi-3, fused layers",
        "Phi3Config",
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        tie_word_embeddings=False,
    ),
    "granite": _of(
        "Granite, multipliers",
        "GraniteConfig",
        vocabulary=True,
        embedding_multiplier=2.0,
        residual_multiplier=0.7,
        attention_multiplier=0.2,
        logits_scaling=1.5,
        tie_word_embeddings=True,
    ),
    "olmo2": _of("OLMo 2", "Olmo2Config", tie_word_embeddings=False),
    "stablelm": _of(
        "StableLM",
        "StableLmConfig",
        refused="StablelmForCausalLM does not support LoRA",
        use_qkv_bias=True,
        tie_word_embeddings=False,
    ),
    "cohere": _of("Command R", "CohereConfig", logit_scale=0.25),
    "glm4": _of(
        "GLM-4, fused gate_up_proj",
        "Glm4Config",
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
        head_dim=32,
        tie_word_embeddings=False,
    ),
    "exaone4": _of(
        "Exaone 4, windows",
        "Exaone4Config",
        vocabulary=True,
        sliding_window=8,
        sliding_window_pattern=None,
        layer_types=_WINDOWS,
        tie_word_embeddings=False,
    ),
    "nemotron": _of(
        "Nemotron, no gate",
        "NemotronConfig",
        ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
        vocabulary=True,
        tie_word_embeddings=False,
    ),
    "smollm3": _of("SmolLM3, layers without positions", "SmolLM3Config", no_rope_layers=[1, 0, 1]),
    "olmo3": _of("OLMo 3, windows", "Olmo3Config", sliding_window=8, layer_types=_WINDOWS),
    "seed-oss": _of("Seed-OSS, biases", "SeedOssConfig", head_dim=32, attention_out_bias=True),
    "hunyuan": _of("Hunyuan", "HunYuanDenseV1Config", head_dim=32),
    "starcoder2": _of(
        "StarCoder 2, biases everywhere",
        "Starcoder2Config",
        ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
        sliding_window=None,
    ),
    "phi2": _of(
        "Phi-2, biases everywhere",
        "PhiConfig",
        ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
        tie_word_embeddings=False,
    ),
    # vLLM's windows of this family hold a token more than transformers': these are longer than what is asked.
    "cohere2": _of("Command R7B", "Cohere2Config", logit_scale=0.25, sliding_window=64, layer_types=_WINDOWS),
}


def adapters(family: Family) -> dict[str, Specimen]:
    """What every family is tried with, by what it is called in the table."""
    whole = {"target_modules": LINEAR}
    words = Specimen({"target_modules": ["lm_head", "embed_tokens", "q_proj"]})
    rows = Specimen({"target_modules": ["q_proj"], "trainable_token_indices": [5, 17, 200]})
    return {
        "every linear layer": Specimen(whole),
        "every linear layer, rank 64, rsLoRA": Specimen({**whole, "r": 64, "use_rslora": True}),
        "every linear layer, DoRA": Specimen({**whole, "use_dora": True}, converted=True),
        "one layer of three": Specimen({"target_modules": list(family.modules), "layers_to_transform": 1}),
        **({"head, embedding and queries": words, "rows": rows} if family.vocabulary else {}),
        **{f"{module} alone": Specimen({"target_modules": [module]}) for module in family.modules},
    }

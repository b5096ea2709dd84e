"""Adapters of every kind that PEFT can make, and what becomes of each: served as it was trained, or refused.

Definitions only; ``trainer`` makes them. ``python -m tests.support.zoo`` prints the table of ``docs/zoo.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from adapters.errors import CURES

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LINEAR = "all-linear"
BY_NAME = [*ATTENTION, *MLP]
MAX_RANK = 256
LAYERS = 3

DEFAULTS = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Specimen:
    """``options`` are those of PEFT's config class for ``tuner``, over ``DEFAULTS`` for LoRA.

    ``way`` names the function of ``trainer`` that trains and saves it, ``style`` the names that the
    tensors get. ``code`` is the refusal; without one it is served, ``converted`` where it must be rewritten.
    ``on_qwen`` is the refusal where vLLM's class for the base has no such layers, as Qwen2's has none.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    code: str | None = None
    converted: bool = False
    dtype: str = "float32"
    way: str = "plain"
    style: str = ""
    tuner: str = "LORA"
    on_qwen: str | None = None

    def code_on(self, base: str) -> str | None:
        """The refusal on ``llama`` or ``qwen``, if it is refused there."""
        return self.code or (self.on_qwen if base == "qwen" else None)

    @property
    def outcome(self) -> str:
        if self.code:
            return f"refused: `{self.code}`"
        served = "served, after conversion" if self.converted else "served"
        return served if self.on_qwen is None else f"{served}; on Qwen2 refused: `{self.on_qwen}`"


def _of(options: Any = (), code: str | None = None, **fields: Any) -> Specimen:
    return Specimen(MappingProxyType(dict(options)), code, **fields)


K1 = "model.layers.1.self_attn.k_proj"
_PATTERNED = {"target_modules": LINEAR, "rank_pattern": {"k_proj": 3}, "alpha_pattern": {"up_proj": 5}}

RANKS = {f"rank {r}": _of({"r": r, "target_modules": LINEAR}) for r in (1, 2, 3, 4, 8, 16, 32, 64, 128, 256)}
RANKS |= {"rank above the server's": _of({"r": 320}, "rank_too_large")}

SCALINGS = {
    "alpha 1": _of({"lora_alpha": 1}),
    "alpha 0.5": _of({"lora_alpha": 0.5}),
    "alpha 512": _of({"lora_alpha": 512}),
    "alpha 0": _of({"lora_alpha": 0}, "alpha_zero"),
    "alpha below 0": _of({"lora_alpha": -8}, "config_invalid"),
    "rsLoRA": _of({"use_rslora": True}),
    "rsLoRA of rank 64": _of({"use_rslora": True, "r": 64, "target_modules": LINEAR}),
}

DTYPES = {name: _of({"target_modules": LINEAR}, dtype=name) for name in ("float16", "bfloat16")}
DTYPES |= {
    "lora_A in float16, lora_B in float32": _of(dtype="float16 beside float32"),
    "float64": _of(code="dtype_unsupported", dtype="float64"),
    "float8": _of(code="dtype_unsupported", dtype="float8_e4m3fn"),
}

TARGETS = {f"only {name}": _of({"target_modules": [name]}) for name in (*ATTENTION, *MLP)}
TARGETS |= {
    "attention": _of({"target_modules": ATTENTION}),
    "the MLP": _of({"target_modules": MLP}),
    "every linear layer by its name": _of({"target_modules": BY_NAME}),
    "every linear layer": _of({"target_modules": LINEAR}),
    "one module by its full name": _of({"target_modules": [K1]}),
    "a suffix with a layer": _of({"target_modules": ["1.mlp.up_proj", "q_proj"]}),
    "a regular expression": _of({"target_modules": r".*\.(q|up)_proj"}),
    "a regular expression of layers": _of({"target_modules": r".*layers\.[02]\..*_proj"}),
    "one layer": _of({"layers_to_transform": 1}),
    "some layers": _of({"layers_to_transform": [0, 2], "target_modules": BY_NAME}),
    "layers of a pattern": _of({"layers_to_transform": [2], "layers_pattern": "layers"}),
    "all but a kind": _of({"target_modules": LINEAR, "exclude_modules": ["down_proj", "o_proj"]}),
    "all but a module": _of({"target_modules": LINEAR, "exclude_modules": [K1]}),
    "all but an expression": _of({"target_modules": LINEAR, "exclude_modules": r".*layers\.1\..*"}),
    "embeddings": _of({"target_modules": ["q_proj", "embed_tokens"]}, on_qwen="module_unknown"),
    "the language-model head": _of({"target_modules": ["q_proj", "lm_head"]}, on_qwen="module_unknown"),
    "norms trained beside": _of({"modules_to_save": ["norm"]}, "modules_to_save_unsupported"),
    "the head trained beside, some rows": _of(
        {"modules_to_save": ["lm_head"]}, converted=True, on_qwen="modules_to_save_unsupported"
    ),
    "embeddings trained beside, some rows": _of(
        {"modules_to_save": ["embed_tokens"]}, converted=True, on_qwen="modules_to_save_unsupported"
    ),
    "tokens trained beside": _of(
        {"trainable_token_indices": [5, 17, 200]}, converted=True, on_qwen="feature_unsupported"
    ),
    "tokens of the head trained beside": _of(
        {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [17, 3]}, "use_rslora": True},
        converted=True,
        on_qwen="feature_unsupported",
    ),
    "tied modules trained beside": _of({"ensure_weight_tying": True}, "feature_unsupported"),
    "a bare parameter": _of({"target_modules": [], "target_parameters": ["q_proj.weight"]}, converted=True),
}

PATTERNS = {
    "rank_pattern": _of({"target_modules": LINEAR, "rank_pattern": {"k_proj": 2, "mlp.up_proj": 16}}),
    "rank_pattern by full name": _of({"target_modules": ATTENTION, "rank_pattern": {K1: 5}}),
    "rank_pattern up to 256": _of({"target_modules": LINEAR, "rank_pattern": {"down_proj": 256}, "r": 2}),
    "alpha_pattern": _of({"target_modules": LINEAR, "alpha_pattern": {"v_proj": 4, "down_proj": 0.5}}),
    "both patterns": _of(_PATTERNED),
    "both patterns with rsLoRA": _of({**_PATTERNED, "use_rslora": True}),
    "two keys for one module": _of(
        {"target_modules": ATTENTION, "rank_pattern": {"k_proj": 2, K1: 6}, "alpha_pattern": {K1: 3}}
    ),
    "patterns, layers and exclusions": _of(
        {
            **_PATTERNED,
            "target_modules": BY_NAME,
            "layers_to_transform": [1, 2],
            "exclude_modules": ["o_proj"],
        }
    ),
    "a pattern that fits nothing": _of({"rank_pattern": {"proj": 2}, "alpha_pattern": {"_proj": 3}}),
    "an expression in rank_pattern": _of({"rank_pattern": {r".*q_proj": 2}}, "pattern_not_literal"),
    "an expression in alpha_pattern": _of({"alpha_pattern": {"(q|v)_proj": 2}}, "pattern_not_literal"),
}

_ON_CHANGED_BASE = {
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA by fast SVD": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
    "CorDA": {"init_lora_weights": "corda"},
}
_LORA_GA = {"init_lora_weights": "lora_ga"}
INITIALISATIONS = {
    "gaussian": _of({"init_lora_weights": "gaussian"}),
    "orthogonal": _of({"init_lora_weights": "orthogonal"}),
    "random": _of({"init_lora_weights": False}),
    "MiCA": _of({"init_lora_weights": "mica"}),
    "EVA": _of({"init_lora_weights": "eva"}),
    "LoftQ": _of({"init_lora_weights": "loftq"}, "init_unsupported", way="of_config"),
    **{name: _of(init, "init_unsupported") for name, init in _ON_CHANGED_BASE.items()},
    **{
        f"{name}, initial weights beside": _of(init, way="with_initial", converted=True)
        for name, init in _ON_CHANGED_BASE.items()
    },
    "PiSSA with rsLoRA, initial weights beside": _of(
        {"init_lora_weights": "pissa", "use_rslora": True}, way="with_initial", converted=True
    ),
    **{f"{name}, converted by PEFT": _of(init, way="converted") for name, init in _ON_CHANGED_BASE.items()},
    "LoRA-GA, initial weights beside": _of(_LORA_GA, way="with_initial", converted=True),
    "LoRA-GA, converted by PEFT": _of(_LORA_GA, way="converted"),
}

VARIANTS = {
    "DoRA": _of({"use_dora": True}, converted=True),
    "DoRA on every linear layer": _of({"use_dora": True, "target_modules": LINEAR}, converted=True),
    "DoRA with rsLoRA": _of({"use_dora": True, "use_rslora": True}, converted=True),
    "DoRA with patterns": _of({**_PATTERNED, "use_dora": True}, converted=True),
    "DoRA, in bfloat16": _of({"use_dora": True}, dtype="bfloat16", converted=True),
    "DoRA under DDP": _of({"use_dora": True}, style="ddp", converted=True),
    "all biases": _of({"bias": "all"}, "bias_unsupported"),
    "LoRA's biases": _of({"bias": "lora_only"}, "bias_unsupported"),
    "a bias on lora_B": _of({"lora_bias": True}, "bias_unsupported"),
    "layer replication": _of({"layer_replication": [(0, 2), (1, 3)]}, "feature_unsupported"),
    "aLoRA": _of({"alora_invocation_tokens": [5, 6]}, "feature_unsupported"),
    "BD-LoRA": _of({}, "feature_unsupported", way="bdlora"),
    "KaSA": _of({}, "feature_unsupported", way="kasa"),
    "Monteclora": _of({}, "feature_unsupported", way="monteclora"),
    "Arrow": _of({"arrow_config": {"top_k": 3}}, "feature_unsupported", way="of_config"),
    "QALoRA": _of({"use_qalora": True}, "feature_unsupported", way="of_config"),
    "Megatron": _of({"megatron_config": {"tp": 1}}, "feature_unsupported", way="of_config"),
    "Conv1D's layout": _of({"fan_in_fan_out": True}, "feature_unsupported", way="of_config"),
    "VeLoRA": _of({}, way="velora", converted=True),
    "dropout": _of({"lora_dropout": 0.2}),
    "a classifier": _of({"task_type": "SEQ_CLS"}, "modules_to_save_unsupported", way="classifier"),
    "added tokens": _of({}, "modules_to_save_unsupported", way="added_tokens"),
}

WAYS = {
    "two adapters added up": _of(way="cat"),
    "two adapters averaged": _of(way="linear"),
    "two adapters through SVD": _of(way="svd"),
    "two adapters by TIES": _of(way="ties"),
    "a backbone alone": _of({"task_type": "FEATURE_EXTRACTION"}, way="backbone", converted=True),
    "pickled": _of(code="weights_not_safetensors", way="pickled"),
    "not trained": _of(code="adapter_no_effect", way="untrained"),
    "diverged": _of(code="weights_not_finite", way="diverged"),
    "of a wider base": _of(code="shape_mismatch", way="wider"),
    "of a deeper base": _of(code="module_unknown", way="deeper"),
    "of a base with other names": _of(
        {"target_modules": ["c_attn"], "fan_in_fan_out": True}, "feature_unsupported", way="gpt2"
    ),
}

STYLES = {
    "without PEFT's prefix": _of(_PATTERNED, style="bare"),
    "of an early PEFT": _of(style="early"),
    "with the adapter's name": _of(_PATTERNED, style="default", converted=True),
    "with another adapter's name": _of(style="my-run", converted=True),
    "under DDP": _of(style="ddp", converted=True),
    "under DeepSpeed and torch.compile": _of(style="deepspeed-compile", converted=True),
    "under torch.compile": _of(style="compile", converted=True),
    "under torch.compile, inside": _of(style="compile-inside", converted=True),
    "under FSDP (Axolotl)": _of(_PATTERNED, style="fsdp", converted=True),
    "under gradient checkpointing": _of(style="checkpoint", converted=True),
    "all wrappers at once": _of(_PATTERNED, style="all", converted=True),
    "by Unsloth": _of({"target_modules": LINEAR}, style="unsloth"),
    "by LLaMA-Factory": _of({"target_modules": LINEAR, "use_rslora": True}, style="llama-factory"),
    "by TRL": _of({"target_modules": LINEAR}, style="trl"),
    "fused (Megatron, vLLM)": _of({"target_modules": LINEAR}, style="fused", converted=True),
    "fused, with patterns": _of(
        {"target_modules": LINEAR, "rank_pattern": dict.fromkeys(("q_proj", "k_proj", "v_proj"), 6)},
        style="fused",
        converted=True,
    ),
    "fused, in bfloat16": _of({"target_modules": LINEAR}, style="fused", converted=True, dtype="bfloat16"),
    "by diffusers": _of(code="tensor_unknown", style="diffusers"),
    "by Megatron-Bridge": _of(code="tensor_unknown", style="linear_in"),
}

# What a tuner needs beyond its defaults on a base this small. Every other type of PEFT is made with those.
_NEEDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2, "target_modules": "self_attn"},
    "C3A": {"block_size": 64},
    "VBLORA": {"vector_length": 64},
}
_TUNERS = """
    ADALORA ADAPTION_PROMPT BEFT BOFT C3A CARTRIDGE CPT DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA
    IA3 LILY LN_TUNING LOHA LOKR MISS MULTITASK_PROMPT_TUNING OFT OSF PEANUT POLY PREFIX_TUNING PROMPT_TUNING
    PSOFT PVERA P_TUNING RANDLORA ROAD SHADOW SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA
    WAVEFT
"""
# X-LoRA wants trained adapters to route between, AdaMSS scikit-learn.
NOT_MADE = frozenset({"XLORA", "ADAMSS"})
TUNERS = {name: _of(_NEEDS.get(name, {}), "not_lora", tuner=name, way="tuner") for name in _TUNERS.split()}

GROUPS: dict[str, dict[str, Specimen]] = {
    "Ranks": RANKS,
    "Scalings": SCALINGS,
    "Types of the weights": DTYPES,
    "What is adapted": TARGETS,
    "Patterns": PATTERNS,
    "Initialisations": INITIALISATIONS,
    "LoRA's variants": VARIANTS,
    "Ways of making and saving": WAYS,
    "Trainers' own names": STYLES,
    "PEFT's other tuners": TUNERS,
}
SPECIMENS = {f"{group}: {name}": one for group, ones in GROUPS.items() for name, one in ones.items()}


def table() -> str:
    """The page for people, in Markdown."""
    served = sum(one.code is None for one in SPECIMENS.values())
    lines = [
        "# The zoo: which adapters are served, and which are refused",
        "",
        f"{len(SPECIMENS)} kinds of adapter, made by PEFT. {served} are served: greedy tokens equal to those"
        " of `transformers` and `peft` in float32, log-probabilities within 0.01. The others are refused when"
        " they are uploaded, with the code shown. `tests/engine/test_zoo.py` holds each line against the"
        " engine, on a Llama and on a Qwen. Printed by `python -m tests.support.zoo`.",
    ]
    for group, ones in GROUPS.items():
        lines += ["", f"## {group}", "", "| Adapter | Options | Outcome |", "|---|---|---|"]
        lines += [f"| {name} | {_shown(one)} | {one.outcome} |" for name, one in ones.items()]
    lines += ["", "## What to do about a refusal", "", "| Code | Cure |", "|---|---|"]
    codes = {code for one in SPECIMENS.values() if (code := one.code_on("qwen"))}
    lines += [f"| `{code}` | {CURES[code]} |" for code in sorted(codes)]
    return "\n".join(lines) + "\n"


def _shown(one: Specimen) -> str:
    text = ", ".join(f"{name}={value!r}" for name, value in one.options.items()).replace("|", "\\|")
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    print(table(), end="")

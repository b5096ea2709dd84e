"""In which bits a base is, by its config or its name, and whether two are in the same. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

# What is added to a model's name where it is quantized -> how vLLM or the trainer calls that.
_NAMES = (
    (r"(?:-unsloth)?-bnb-[48]bit|-nf4", "bitsandbytes"),
    (r"-gptq(?:-int[48]|-[48]bit)?", "gptq"),
    (r"-awq(?:-int4|-4bit)?", "awq"),
    (r"-hqq(?:-int[48]|-[48]bit)?", "hqq"),
    (r"-fp8(?:-dynamic|-block)?", "fp8"),
    (r"-nvfp4(?:a16)?", "nvfp4"),
    (r"-mxfp4(?:a16)?", "mxfp4"),
    (r"-gguf", "gguf"),
    (r"[.-](?:quantized[.-])?w[48]a(?:16|8)(?:-asym)?", "compressed-tensors"),
    (r"-(?:int)?[48]-?bit|-int[48]", "few bits"),
)
_ANY = re.compile("|".join(pattern for pattern, _ in _NAMES))
_FLOATS = ("fp8", "nvfp4", "mxfp4")
# Models whose makers trained and published them in few bits: ``model_type`` -> ``quant_method``s.
_PUBLISHED = {
    "gpt_oss": ("mxfp4",),
    "deepseek_v3": ("fp8",),
    "deepseek_v32": ("fp8",),
    "kimi_k2": ("fp8", "compressed-tensors"),
    "minimax_m2": ("fp8",),
}


class Bits(NamedTuple):
    """``method`` as vLLM calls it; ``form`` is ``w4a16``, ``w4``, ``fp8`` …, empty where it is not known."""

    method: str
    form: str = ""

    def __str__(self) -> str:
        return self.method if self.form in ("", self.method) else f"{self.method} {self.form}"

    def may_be(self, other: Bits) -> bool:
        """Whether both may be the same bits: nothing that is known of them differs."""
        if self.form == other.form and self.form in _FLOATS:
            return True
        known = self.form and other.form
        alike = not known or self.form.startswith(other.form) or other.form.startswith(self.form)
        return self.method == other.method and alike


def bits_by_name(name: str) -> Bits | None:
    """Of a model's name or path; None where it does not say that it is quantized."""
    name = name.casefold()
    for pattern, method in _NAMES:
        if found := re.search(pattern, name):
            return Bits(method, _form_in(found[0]))
    return None


def bits_in(quantization: Mapping[str, Any]) -> Bits:
    """Of a ``quantization_config``."""
    method = str(quantization.get("quant_method") or "unknown").casefold()
    if method == "compressed-tensors":
        return Bits(method, _of_groups(quantization.get("config_groups")))
    if method == "bitsandbytes":
        return Bits(method, "w8" if quantization.get("load_in_8bit") else "w4")
    if method in ("gptq", "awq"):
        bits = quantization.get("bits") or quantization.get("w_bit")
        return Bits(method, f"w{bits}a16" if bits else "")
    return Bits(method, _form_in(f"{method} {quantization.get('quant_algo', '')}".casefold()))


def are_published(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> bool:
    """Whether the model of this ``config.json`` was published in such bits, and has no original in more."""
    method = str(quantization.get("quant_method") or "").casefold()
    return method in _PUBLISHED.get(str(config.get("model_type")), ())


def parse(text: str) -> Bits:
    """What ``str`` made of one."""
    method, _, form = text.rpartition(" ")
    return Bits(method, form) if method else Bits(form, form if form in _FLOATS else "")


def without_bits(name: str) -> str:
    """A model's name in small letters, without what says that it is quantized."""
    return _ANY.sub("", name.casefold())


def _of_groups(groups: Any) -> str:
    """The form of the first group of layers; several are rare, and a model's name says no more."""
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            bits, inputs = weights.get("num_bits", 8), group.get("input_activations") or {}
            if weights.get("type") == "float":
                return "fp8" if bits == 8 else "nvfp4"
            return f"w{bits}a{inputs.get('num_bits', 16)}"
    return ""


def _form_in(text: str) -> str:
    if found := re.search(r"w[48]a(?:16|8)", text):
        return found[0]
    found = re.search("|".join(_FLOATS), text)
    if found is None and (digit := re.search(r"[48](?=-?bit|\b)", text)):
        return f"w{digit[0]}"
    return found[0] if found else ""

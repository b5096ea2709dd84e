"""Files of trainers that save adapters in another form than PEFT, by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from adapters.errors import AdapterRejected, fault

# A file's name -> whose it is. None of them is what PEFT's save_pretrained writes.
_FOREIGN = (
    (r"(?:\d+_)?adapters\.safetensors", "MLX-LM"),
    (r"model_weights\.ckpt|.+\.nemo", "NeMo"),
    (r"pytorch_lora_weights\.safetensors", "diffusers"),
    (r"lora\.safetensors", "mistral-finetune"),
    (r".+\.gguf", "llama.cpp"),
)
# Fields of an adapter_config.json that MLX-LM writes and PEFT does not.
_MLX_FIELDS = frozenset({"lora_parameters", "fine_tune_type"})


def trainer_of(filename: str) -> str | None:
    """Whose file ``filename``, without its folders, is; None for every other name."""
    return next((tool for pattern, tool in _FOREIGN if re.fullmatch(pattern, filename)), None)


def refuse_foreign(filenames: Iterable[str]) -> None:
    """AdapterRejected (``layout_foreign``) where one of ``filenames`` is another trainer's adapter."""
    for name in sorted(filenames):
        if (tool := trainer_of(name)) is not None:
            raise foreign(f"The upload holds {name[:120]!r}, an adapter as {tool} saves it.", name)


def refuse_foreign_config(fields: Iterable[str], filename: str) -> None:
    """AdapterRejected (``layout_foreign``) for a config whose ``fields`` are MLX-LM's."""
    if _MLX_FIELDS.intersection(fields):
        raise foreign(f"{filename}: it is MLX-LM's, and not PEFT's.", filename)


def foreign(message: str, filename: str) -> AdapterRejected:
    return fault("layout_foreign", message, param=filename)

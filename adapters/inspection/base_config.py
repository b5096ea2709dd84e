"""``config.json`` of a base model's folder, read as it lies there, before any weight is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "config.json"


def read_base_config(model_dir: Path) -> dict[str, Any] | None:
    """What the file holds; None where there is none, as for a hub's id, which is no folder.

    Raises OSError where it cannot be read, ValueError where it is no JSON object.
    """
    path = model_dir / NAME
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise ValueError(f"{path} is no JSON: {exc}") from exc
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no JSON object")
    return config


def read_hub_config(model: str, *, revision: str | None, token: str | bool | None) -> dict[str, Any] | None:
    """The same of a hub's id, from the hub or its cache; None where it says nothing. Raises OSError where
    neither has it."""
    from transformers import PretrainedConfig

    found: dict[str, Any] = PretrainedConfig.get_config_dict(model, revision=revision, token=token)[0]
    return found or None


def quantization_in(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Its ``quantization_config``; None where the weights are as they were trained."""
    inner = config.get("text_config")
    found = config.get("quantization_config") or (inner if isinstance(inner, dict) else {}).get(
        "quantization_config"
    )
    return found if isinstance(found, dict) else None


def labels_of(config: Mapping[str, Any]) -> int:
    """How many labels the classifier that it describes has; 0 for another model."""
    names = config.get("architectures")
    if not isinstance(names, list) or not any(
        str(name).endswith("ForSequenceClassification") for name in names
    ):
        return 0
    labels = config.get("id2label")
    return len(labels) if isinstance(labels, dict) and labels else 2

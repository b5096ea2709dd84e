"""Ways to spoil a good adapter: its config, its tensors, or the files as they lie in the folder."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from tests.support.peft_adapters import A0, Config, Tensors


def zero(tensors: Tensors, part: str) -> None:
    for name in tensors:
        if part in name:
            tensors[name] = torch.zeros_like(tensors[name])


def cancel(tensors: Tensors) -> None:
    """[A; A] and [B, -B]: neither is zero, their product is."""
    for name, weight in tensors.items():
        half = weight[:2] if "lora_A" in name else weight[:, :2]
        tensors[name] = torch.cat([half, half] if "lora_A" in name else [half, -half], int("lora_B" in name))


@dataclasses.dataclass(frozen=True)
class Bad:
    """A good adapter, spoiled: first its config and tensors, then the files as they lie in the folder."""

    code: str
    says: tuple[str, ...]
    change: Callable[[Config, Tensors], Any] = lambda config, tensors: None
    damage: Callable[[Path], Any] = lambda folder: None
    serving_dtype: str | None = None
    fingerprint: str | None = None


def field(code: str, name: str, value: Any, *says: str) -> Bad:
    return Bad(code, (name, *says), lambda config, _: config.update({name: value}))


def text(edit: Callable[[str], str | bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / CONFIG_FILE
        edited = edit(path.read_text())
        path.write_bytes(edited if isinstance(edited, bytes) else edited.encode())

    return damage


def header(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Edits the parsed header; the data stays. ``edit`` may return the header's text instead."""

    def damage(folder: Path) -> None:
        path = folder / WEIGHTS_FILE
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        parsed = json.loads(data[8 : 8 + length])
        edited = edit(parsed)
        raw = edited if isinstance(edited, bytes) else json.dumps(parsed).encode()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])

    return damage


def weights(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / WEIGHTS_FILE
        path.write_bytes(edit(path.read_bytes()))

    return damage


def rename(old: str, new: str) -> Callable[[Config, Tensors], None]:
    def change(_: Config, tensors: Tensors) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def tensor(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Config, Tensors], None]:
    def change(_: Config, tensors: Tensors) -> None:
        tensors[name] = value(tensors.get(name, torch.zeros(4, 64)))

    return change


def poison(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(weight: torch.Tensor) -> torch.Tensor:
        poisoned = weight.clone()
        poisoned[-1, -1] = value
        return poisoned

    return change


def first(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return header(lambda parsed: edit(parsed[A0]) and None)


def share_bytes(folder: Path) -> None:
    """The second tensor lies inside the first; the others move up, so that the file's size fits."""
    path = folder / WEIGHTS_FILE
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    parsed = json.loads(data[8:start])
    parsed.pop("__metadata__", None)
    first, second, *rest = sorted(parsed.values(), key=lambda entry: entry["data_offsets"])
    begin, end = second["data_offsets"]
    size = end - begin
    second["data_offsets"] = [0, size]
    for entry in rest:
        entry["data_offsets"] = [at - size for at in entry["data_offsets"]]
    assert size <= first["data_offsets"][1]
    raw = json.dumps(parsed).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[start + size :])


def declare(config: Config, _: Tensors) -> None:
    config["base_model_fingerprint"] = "aa"


def grown(factor: float, name: str) -> Callable[[Config, Tensors], Any]:
    """Multiplies one tensor: a finite one, in a float32 file."""
    return lambda _, tensors: tensors.update({name: tensors[name] * factor})

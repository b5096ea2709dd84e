"""The nouns of the registry. Frozen values, no I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

TENANT_PATTERN = r"[a-z0-9][a-z0-9-]{0,62}"
ADAPTER_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def is_tenant_id(text: str) -> bool:
    return re.fullmatch(TENANT_PATTERN, text) is not None


def is_adapter_name(text: str) -> bool:
    return re.fullmatch(ADAPTER_PATTERN, text) is not None


class Tier(StrEnum):
    """How near to the GPU an adapter version is."""

    DISK = "disk"
    HOST = "host"
    GPU = "gpu"


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """A linear layer of the base model as PEFT sees it: ``weight`` is (out_features, in_features)."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What the engine has loaded, as its worker reports it.

    ``modules`` maps the full name of every layer that can carry a LoRA, in the names of the
    checkpoint (``model.layers.0.self_attn.q_proj``, never the fused ``qkv_proj``), to its shape.
    ``fused`` maps a fused suffix to its parts (``qkv_proj`` -> q, k, v) for error messages.
    """

    name: str
    modules: Mapping[str, ModuleShape]
    max_lora_rank: int
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What inspection learned about one adapter's files.

    ``rank`` is the largest rank of any pair, ``size_bytes`` the size of both files together,
    ``modules`` the full names of the base modules it changes, sorted.
    """

    rank: int
    alpha: float
    use_rslora: bool
    dtype: str
    size_bytes: int
    modules: tuple[str, ...]
    target_modules: tuple[str, ...]
    layers: tuple[int, ...]
    base_model: str | None = None
    warnings: tuple[str, ...] = ()

    def report(self) -> dict[str, Any]:
        """The manifest as JSON for the operator: counts instead of 200 module names."""
        report = asdict(self)
        report["modules"] = len(self.modules)
        report["target_modules"] = list(self.target_modules)
        report["layers"] = list(self.layers)
        report["warnings"] = list(self.warnings)
        return report


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable upload of one adapter. What a lease is taken on."""

    tenant: str
    adapter: str
    number: int
    digest: str
    path: Path
    rank: int
    size_bytes: int = 0

    @property
    def key(self) -> str:
        """The engine's name for it. A new version is a new name, so KV blocks are never shared."""
        return f"{self.tenant}/{self.adapter}@{self.digest}"


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """A version as the admin API shows it."""

    version: Version
    created_at: datetime
    report: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Adapter:
    """One customer's adapter: a name, its versions, and which of them answers."""

    tenant: str
    name: str
    live: int | None
    default: bool
    pinned: bool
    created_at: datetime
    versions: tuple[VersionInfo, ...]

    @property
    def live_version(self) -> Version | None:
        return next((v.version for v in self.versions if v.version.number == self.live), None)

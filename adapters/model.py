"""The nouns of the registry. Frozen values, no I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from adapters.split import WHOLE

TENANT_PATTERN = r"[a-z0-9][a-z0-9-]{0,62}"
ADAPTER_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"

# What a request names for its tenant's default adapter; no adapter is called so.
DEFAULT_MODEL = "default"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# What PEFT calls path_initial_model_for_weight_conversion: the weights before training, for the conversion of
# PiSSA and its kin. Read at upload, never kept.
INITIAL_FILE = "initial_adapter_model.safetensors"
# What the training side saw, see adapters.inspection.golden. Kept with the version, not among its files.
PROBES_FILE = "probes.json"

# What a trainer saves of a tokenizer beside an adapter. Read at upload; what differs from the base is kept in
# CHAT_FILE, which is one of the version's files. See adapters.inspection.chat_files.
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILE = "tokenizer.json"
ADDED_TOKENS_FILE = "added_tokens.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
GENERATION_FILE = "generation_config.json"
CHAT_FILES = (
    TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, ADDED_TOKENS_FILE, SPECIAL_TOKENS_FILE,
    GENERATION_FILE,
)  # fmt: skip
CHAT_FILE = "chat.json"


def is_tenant_id(text: str) -> bool:
    return re.fullmatch(TENANT_PATTERN, text) is not None


def is_adapter_name(text: str) -> bool:
    return re.fullmatch(ADAPTER_PATTERN, text) is not None


def well_formed(tenant: str, name: str) -> bool:
    """PostgreSQL refuses some text (NUL, lone surrogates), so names are looked at before it is asked."""
    return is_tenant_id(tenant) and is_adapter_name(name)


class Tier(StrEnum):
    """How near to the GPU an adapter version is."""

    DISK = "disk"
    HOST = "host"
    GPU = "gpu"


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """A linear layer of the base model as PEFT sees it: ``weight`` is (out_features, in_features).

    ``experts`` of them are adapted by one pair, whose rank is that many times the adapter's; see
    ``adapters.inspection.experts``.
    """

    in_features: int
    out_features: int
    experts: int = 1


@dataclass(frozen=True, slots=True)
class Head:
    """The layer by which a base model classifies or scores: ``labels`` numbers of ``in_features``.

    ``most`` is how many labels an adapter's own head may have: 0 where it may have none, None where the
    server that will serve it decides.
    """

    module: str
    in_features: int
    labels: int
    most: int | None = None


@dataclass(frozen=True, slots=True)
class BaseChat:
    """How a base model chats: its template, the ids of its added tokens, and how many tokens it embeds.

    ``stop_token_ids`` end its answers. ``free`` are ids that special tokens of an adapter's own may have:
    rows of the embedding without a token, and special tokens that an adapter may call otherwise.
    ``tokenizer`` has the digests that each part of its tokenizer.json may have (``tokenizer_parts``), and
    ``flags`` what its tokenizer does beside them; empty where that is not known.
    """

    template: str | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)
    free: frozenset[int] = frozenset()
    vocabulary: int = 0
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    tokenizer: Mapping[str, frozenset[str]] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What the engine has loaded, as its worker reports it.

    ``modules`` maps the full name of every layer that can carry a LoRA, in the names of the
    checkpoint (``model.layers.0.self_attn.q_proj``, never the fused ``qkv_proj``), to its shape.
    ``aliases`` maps other full names for the same layers (of older releases of transformers, or of a
    multimodal model's language model by itself) to those.
    ``fused`` maps a fused suffix to its parts in the order of their rows (``qkv_proj`` -> q, k, v).
    ``source`` is the folder or hub id it was loaded from; ``fingerprint`` is that of
    ``adapters.inspection.base_model``.
    ``pooling`` if it makes embeddings or, with a ``head``, labels instead of text. ``dora`` if DoRA can be
    computed on it.
    ``quantized`` is the method by which its weights were put into few bits (``gptq w4a16``), if they were;
    ``published_quantized`` if its makers trained and published it so, and it is nobody's copy.
    ``vocabulary`` maps ``lm_head`` and ``model.embed_tokens`` to their shapes where adapters are served on
    them; an embedding has the tokens as its inputs, as PEFT's ``lora_embedding_A`` does.
    """

    name: str
    modules: Mapping[str, ModuleShape]
    max_lora_rank: int
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    source: str | None = None
    fingerprint: str | None = None
    pooling: bool = False
    dora: bool = False
    quantized: str | None = None
    published_quantized: bool = False
    vocabulary: Mapping[str, ModuleShape] = field(default_factory=dict)
    chat: BaseChat | None = field(default=None, compare=False, repr=False)
    head: Head | None = None

    @property
    def makes(self) -> Literal["text", "embeddings", "labels"]:
        """What the base model answers with, in words."""
        if not self.pooling:
            return "text"
        return "embeddings" if self.head is None else "labels"

    def shape(self, module: str) -> ModuleShape | None:
        """The shape of a layer that adapters are served on; None for any other name."""
        return self.modules.get(module) or self.vocabulary.get(module)


@dataclass(frozen=True, slots=True)
class Coverage:
    """What an adapter does to one kind of module, such as ``self_attn.q_proj``, over all layers.

    ``layers`` are those it changes, of ``available`` in the base. ``rank``, ``scaling`` (what BA is
    multiplied with) and ``norm`` (the Frobenius norm of scaling * BA) are (smallest, largest) over those.
    ``norms`` has the norm of each of ``layers``.
    """

    module: str
    layers: tuple[int, ...]
    available: int
    rank: tuple[int, int]
    scaling: tuple[float, float]
    norm: tuple[float, float]
    norms: tuple[float, ...] = field(default=(), compare=False)

    def as_json(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "layers": ranges(self.layers),
            "available": self.available,
            "rank": list(self.rank),
            "scaling": list(self.scaling),
            "norm": list(self.norm),
            "norms": [float(f"{norm:.4g}") for norm in self.norms],
        }


@dataclass(frozen=True, slots=True)
class Manifest:
    """What inspection learned about one adapter's files.

    ``rank`` is the largest rank of any pair, ``size_bytes`` the size of both files together,
    ``modules`` the full names of the base modules it changes, sorted. ``conversions`` says what was rewritten
    so that it can be served, and ``original_digest`` names the files as they were uploaded, if anything was.
    ``probe`` is what the engine showed of it, see ``server.publishing.probe``; None where no
    engine has been asked.
    ``golden`` is how it compares with the training side, see
    ``adapters.inspection.golden``; None without that.
    ``implausible`` says why the size would have been refused, and ``ignored_fields`` names the unknown fields
    of the config that have a meaning, where the upload waived these checks (``Waivers``).
    ``chat`` is what it says about chats, see ``adapters.inspection.chat_files``; None where it says nothing.
    ``labels`` is how many its own head has (``adapters.inspection.heads``); None where it has no head.
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
    coverage: tuple[Coverage, ...] = ()
    warnings: tuple[str, ...] = ()
    conversions: tuple[str, ...] = ()
    original_digest: str | None = None
    probe: Mapping[str, Any] | None = None
    golden: Mapping[str, Any] | None = None
    implausible: str | None = None
    ignored_fields: tuple[str, ...] = ()
    chat: Mapping[str, Any] | None = None
    labels: int | None = None

    @property
    def waived(self) -> dict[str, Any]:
        """The checks that the upload went without, for the audit."""
        found = {"implausible": self.implausible, "ignored_fields": list(self.ignored_fields)}
        return {name: value for name, value in found.items() if value}

    def as_json(self) -> dict[str, Any]:
        """The report of the version: counts instead of 200 module names."""
        report = asdict(self)
        report["modules"] = len(self.modules)
        report["target_modules"] = list(self.target_modules)
        report["layers"] = list(self.layers)
        report["coverage"] = [row.as_json() for row in self.coverage]
        report["warnings"] = list(self.warnings)
        report["conversions"] = list(self.conversions)
        report["ignored_fields"] = list(self.ignored_fields)
        return report


@dataclass(frozen=True, slots=True)
class Waivers:
    """What whoever uploads an adapter accepts, though it would be refused otherwise.

    ``no_effect``: it answers as the base does. ``implausible``: it is larger than training makes one; for
    operators alone, since it may overflow. ``fields``: names of fields of its config that nobody knows here.
    """

    no_effect: bool = False
    implausible: bool = False
    fields: tuple[str, ...] = ()


NOTHING_WAIVED = Waivers()


def ranges(numbers: Iterable[int]) -> str:
    """Sorted numbers for people: 0, 1, 2, 5 -> ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(str(end) for end in run) for run in runs)


@dataclass(frozen=True, slots=True)
class Quota:
    """The most adapters, bytes of all their versions, and versions of one adapter; None is no limit.

    ``keep`` is how many versions an upload leaves where the adapter does not say; 0 for all.
    """

    adapters: int | None = None
    size_bytes: int | None = None
    versions: int | None = None
    keep: int = 0


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable upload of one adapter. What a lease is taken on.

    ``quarantine`` is why it is out of service, if it is: see ``adapters.store.quarantine``. ``base`` is the
    fingerprint of the base model that it was tried on when it was uploaded, where that is known. ``chat`` is
    how it chats: ``kept`` if it has a ``CHAT_FILE``, ``content_format``, ``stop_token_ids``, and
    ``defaults``, the adapter's own over those of its files. ``labels`` is how many its own head has, if it
    has one.
    """

    tenant: str
    adapter: str
    number: int
    digest: str
    path: Path
    rank: int
    size_bytes: int = 0
    quarantine: str | None = field(default=None, compare=False)
    base: str | None = field(default=None, compare=False)
    chat: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    labels: int | None = field(default=None, compare=False, repr=False)

    @property
    def key(self) -> str:
        """The engine's name for it. A new version is a new name, so KV blocks are never shared."""
        return f"{self.tenant}/{self.adapter}@{self.digest}"


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """A version as the admin API shows it. ``report`` is JSON; None where it was not asked for."""

    version: Version
    created_at: datetime
    report: str | None = None
    quarantine: Mapping[str, Any] | None = None
    note: str | None = None
    uploader: str | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """One customer's adapter: a name, its versions, and which of them answers.

    ``split`` maps versions to their shares of the requests, in percent; None where the live one answers all.
    ``keep_versions`` is how many uploads leave behind, 0 for all; None where the server's setting holds.
    """

    tenant: str
    name: str
    live: int | None
    default: bool
    pinned: bool
    created_at: datetime
    versions: tuple[VersionInfo, ...]
    split: Mapping[int, int] | None = None
    keep_versions: int | None = None
    defaults: Mapping[str, Any] | None = None

    def upload_as_json(self, number: int, report: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to the upload that became version ``number``, of which ``report`` is."""
        (info,) = (info for info in self.versions if info.version.number == number)
        return {
            "adapter": self.name,
            "version": number,
            "digest": info.version.digest,
            "live": self.live,
            "report": dict(report),
        }

    @property
    def live_version(self) -> Version | None:
        return next((v.version for v in self.versions if v.version.number == self.live), None)

    @property
    def shares(self) -> tuple[tuple[Version, int], ...]:
        """The versions that answer to the name, by number, with their shares of the requests in percent."""
        split = self.split or ({} if self.live is None else {self.live: WHOLE})
        found = (info.version for info in self.versions)
        return tuple((version, split[version.number]) for version in found if version.number in split)

"""``adapter_config.json``: every field PEFT writes is read, known to be harmless, or refused.

A test holds the three lists against the fields of the installed PEFT, so that a new one needs a decision.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import ConfigDict, Field

from adapters.errors import AdapterRejected, fault
from adapters.inspection import strict_json
from adapters.inspection.experts import is_stacked, parameter_of, unknown_parameters
from adapters.inspection.heads import may_save, why_not
from adapters.inspection.layouts import refuse_foreign_config
from adapters.inspection.module_names import match, suffixes
from adapters.inspection.quantized_names import bits_by_name, parse, without_bits
from adapters.inspection.strict_json import show
from adapters.inspection.targets import Targets
from adapters.model import CONFIG_FILE, BaseModel

MAX_CONFIG_BYTES = 1 << 20

# vLLM compiles every key as a regular expression and looks it up per module, in a cache of 500. Past that
# each look-up compiles again: 560 keys took 99 s where 400 took 3 s. Half of it, as two are staged at once.
MAX_PATTERN_KEYS = 250
MAX_PATTERN_KEY = 512  # characters


def _is_set(value: Any) -> bool:
    """PEFT turns a variant on for anything that is not None, also for an empty list or dictionary."""
    return value is not None and value is not False


def _modifies_base(init: Any) -> bool:
    """vLLM's rule: these initialisations alone leave the base weights as they are."""
    return isinstance(init, str) and init.lower() not in ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


# field -> (code, when it is refused, why)
REFUSED: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "use_dora": (
        "dora_unsupported",
        bool,
        "DoRA needs weights of the base that are not quantized, one worker, and on a GPU DORA_ON_GPU",
    ),
    "bias": ("bias_unsupported", lambda bias: bias != "none", "trained biases are not served"),
    "lora_bias": ("bias_unsupported", bool, "a bias on lora_B is not served"),
    "modules_to_save": ("modules_to_save_unsupported", bool, "fully trained layers would be dropped"),
    "init_lora_weights": (
        "init_unsupported",
        _modifies_base,
        "this initialisation changes the base weights, which are shared here",
    ),
    "trainable_token_indices": ("feature_unsupported", bool, "trained token embeddings would be dropped"),
    "layer_replication": (
        "feature_unsupported",
        bool,
        "the base model's layers are shared and stay as they are",
    ),
    "ensure_weight_tying": ("feature_unsupported", bool, "tied adapters are not served"),
    "fan_in_fan_out": ("feature_unsupported", bool, "it belongs to Conv1D layers, which are not served"),
    "use_qalora": ("feature_unsupported", bool, "QALoRA pools the input of lora_A"),
    "alora_invocation_tokens": ("feature_unsupported", _is_set, "aLoRA applies to a part of the tokens only"),
    "use_bdlora": ("feature_unsupported", _is_set, "BD-LoRA stores block-diagonal factors"),
    "arrow_config": ("feature_unsupported", _is_set, "Arrow routes between several adapters"),
    "kasa_config": ("feature_unsupported", _is_set, "KaSA truncates the base weights"),
    "monteclora_config": ("feature_unsupported", _is_set, "Monteclora saves a sampler beside the weights"),
    "megatron_config": ("feature_unsupported", _is_set, "Megatron's parallel layers have another layout"),
}

# Training and bookkeeping: a forward pass without gradients is the same with and without them.
HARMLESS = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "unsloth_fixed",
        "velora_config",
    }
)

Rank = Annotated[int, Field(ge=1)]


class PeftConfig(pydantic.BaseModel):
    """The fields that decide what is served; ``model_extra`` holds the others."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)

    r: Rank
    lora_alpha: float
    target_modules: list[str] | str | None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    use_rslora: bool | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    base_model_name_or_path: str | None = Field(None, max_length=1024)
    base_model_fingerprint: str | None = Field(None, max_length=128)
    task_type: str | None = Field(None, max_length=64)

    @property
    def dora(self) -> bool:
        """Whether each output has a magnitude of its own; see ``adapters.inspection.dora``."""
        return bool((self.model_extra or {}).get("use_dora"))

    @property
    def saves(self) -> Any:
        """``modules_to_save``: a head of its own, where it was not refused."""
        return (self.model_extra or {}).get("modules_to_save")

    def rank_of(self, module: str) -> int:
        """The rank PEFT gave ``module``, a name without the ``base_model.model.`` prefix."""
        return match(self.rank_pattern or {}, self._name_of(module)) or self.r

    def scaling_of(self, module: str) -> float:
        """What lora_B is multiplied with: alpha / r, with rsLoRA alpha / sqrt(r) (arXiv:2312.03732)."""
        alpha = match(self.alpha_pattern or {}, self._name_of(module)) or self.lora_alpha
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets_weight(self, module: str) -> bool:
        """Whether ``target_parameters`` names the weight that the pair of ``module`` changes."""
        named = self.target_parameters or ()
        return any(suffix in named for suffix in suffixes(parameter_of(module)))

    def _name_of(self, module: str) -> str:
        """What the patterns are compared with: the parameter's name where that was adapted."""
        by_weight = is_stacked(module) or self.targets_weight(module)
        return parameter_of(module) if by_weight else module

    def warnings(self, base: BaseModel, adapted: Collection[str]) -> list[str]:
        """What is served as it stands but may not be what was meant; ``adapted`` are the module names."""
        found = {suffix for module in adapted for suffix in suffixes(module)}
        named = {suffix for module in adapted for suffix in suffixes(self._name_of(module))}
        return [
            *self._other_base(base),
            *self._quantized_base(base),
            *self._other_task(base),
            *self._risky_init(),
            *self._without_tensors(found),
            *self._partly_without_tensors(base, adapted, found),
            *self._idle_patterns(named),
            *self._shadowed_patterns(named),
        ]

    @functools.cached_property
    def targets(self) -> Targets:
        return Targets.of(
            self.target_modules or (), self.exclude_modules, self.layers_to_transform, self.layers_pattern
        )

    def check_targets(
        self, base: BaseModel, adapted: Collection[str], targets: Targets | None = None
    ) -> None:
        """Refuses tensors that PEFT would ignore, and missing ones that it would fill at random."""
        targets = targets or self.targets
        beyond = [module for module in adapted if not self._covers(module, targets)]
        if beyond:
            raise _refuse(
                "target_mismatch",
                f"target_modules, exclude_modules and layers_to_transform leave out {_some(beyond)}, which"
                " have tensors.",
            )
        if (self.model_extra or {}).get("init_lora_weights") is False:
            missing = [m for m in base.modules if m not in adapted and targets.covers(m)]
            if missing:
                raise _refuse(
                    "target_mismatch",
                    f"it targets {_some(missing)}, which have no tensors, and with init_lora_weights=False"
                    " PEFT fills those at random.",
                )

    def _covers(self, module: str, targets: Targets) -> bool:
        """False where PEFT would ignore its tensors; True also where only an expression could tell."""
        if is_stacked(module) or self.targets_weight(module):
            return self.targets_weight(module)
        return targets.covers(module) is not False

    def _other_base(self, base: BaseModel) -> Iterable[str]:
        named = self.base_model_name_or_path
        served = {_last_part(name) for name in (base.name, base.source) if name}
        if named and _last_part(named) not in served:
            yield f"it names the base model {show(named)}, and {show(base.name)} is served"

    def _quantized_base(self, base: BaseModel) -> Iterable[str]:
        """Where it was trained on other bits than are served."""
        named = self.base_model_name_or_path
        trained, by_name = bits_by_name(named or ""), bits_by_name(f"{base.name} {base.source or ''}")
        served = parse(base.quantized) if base.quantized else by_name
        if trained and served:
            same = trained.may_be(served) or (not served.form and trained == by_name)
        else:
            same = trained is served or (trained is None and base.published_quantized)
        ids = {_hub_id(name) for name in (base.name, base.source) if name} - {None}
        if not named or same or _hub_id(named) in ids:
            return
        differ = "its answers differ a little from those in training; a probes.json says how far"
        if served is None:
            yield (
                f"it was trained on a quantized copy of the base, {show(named)}, and is served on another:"
                f" {differ}"
            )
        elif trained is None:
            yield f"it names the base {show(named)}, and is served on a quantized copy ({served}): {differ}"
        else:
            copy = "the published base" if base.published_quantized else "a copy of the base"
            yield (
                f"it was trained on {show(named)} ({trained}), and is served on {copy} that is"
                f" quantized in another way ({served}): {differ}"
            )

    def _other_task(self, base: BaseModel) -> Iterable[str]:
        served = {"text": "CAUSAL_LM", "embeddings": "FEATURE_EXTRACTION", "labels": "SEQ_CLS"}[base.makes]
        if self.task_type not in (None, served):
            yield f"its task_type is {show(self.task_type)}; it is served as {served}"

    def _risky_init(self) -> Iterable[str]:
        init = (self.model_extra or {}).get("init_lora_weights")
        if isinstance(init, str) and init.lower() == "lora_ga":
            yield (
                "LoRA-GA trains on changed base weights: unless the adapter was converted with"
                " path_initial_model_for_weight_conversion, it answers differently here, as in PEFT"
            )

    def _without_tensors(self, found: set[str]) -> Iterable[str]:
        if isinstance(self.target_modules, list):
            missing = [name for name in self.target_modules if name not in found]
            if missing:
                yield f"target_modules without a tensor, served as the base has them: {_some(missing)}"

    def _partly_without_tensors(
        self, base: BaseModel, adapted: Collection[str], found: set[str]
    ) -> Iterable[str]:
        missing = [
            module
            for module in base.modules
            if module not in adapted and self.targets.covers(module) and self._is_named_by(found, module)
        ]
        if missing:
            yield f"targeted modules without tensors, served as the base has them: {_some(missing)}"

    def _is_named_by(self, found: set[str], module: str) -> bool:
        """Whether a name in ``target_modules`` that has tensors elsewhere is one of ``module``'s, too."""
        names = self.targets.modules
        return not isinstance(names, str) and any(s in found and s in names for s in suffixes(module))

    def _idle_patterns(self, found: set[str]) -> Iterable[str]:
        for field in ("rank_pattern", "alpha_pattern"):
            idle = [key for key in getattr(self, field) or {} if key not in found]
            if idle:
                yield f"{field} keys that match no module of the adapter: {_some(idle)}"

    def _shadowed_patterns(self, found: set[str]) -> Iterable[str]:
        """PEFT sorts the keys when it saves, so the first match may be another one than in training."""
        for field in ("rank_pattern", "alpha_pattern"):
            pattern: Mapping[str, float] = getattr(self, field) or {}
            for key in pattern:
                longer = next((k for k in found if k in pattern and k.endswith(f".{key}")), None)
                if longer and pattern[longer] != pattern[key]:
                    yield (
                        f"in {field} both {show(key)} ({pattern[key]}) and {show(longer)} ({pattern[longer]})"
                        " match a module; the first in the file counts, as in PEFT"
                    )
                    break


def read_config(path: Path, base: BaseModel) -> PeftConfig:
    """The adapter's configuration; raises AdapterRejected for what ``base`` cannot serve faithfully.

    Says nothing about unknown fields: that is ``check_unknown_fields``.
    """
    return parse_config(load_fields(path), base)


def parse_config(fields: Mapping[str, Any], base: BaseModel) -> PeftConfig:
    """``fields`` as a configuration; raises AdapterRejected for what ``base`` cannot serve faithfully."""
    _check_type(fields)
    _check_features(fields, base)
    config = _validate(fields)
    _check_parameters(config, base)
    _check_alpha(config)
    _check_max_rank(config, base)
    _check_patterns(config, base)
    return config


def check_unknown_fields(config: PeftConfig, ignored: Collection[str] = ()) -> tuple[str, ...]:
    """The fields that PEFT's LoRA does not know and that say something, each of them in ``ignored``.

    Other tools write fields of their own, and one of them may change the forward pass (an invocation string,
    a variant of LoRA). null, false, {} and [] say nothing. Raises AdapterRejected (``config_unknown_field``)
    for one that is not in ``ignored``.
    """
    unknown = {
        name: value
        for name, value in (config.model_extra or {}).items()
        if name not in HARMLESS and name not in REFUSED and not _says_nothing(value)
    }
    refused = sorted(unknown.keys() - set(ignored))
    if refused:
        shown = ", ".join(f"{show(name)}: {show(unknown[name])}" for name in refused[:3])
        raise _refuse("config_unknown_field", f"PEFT's LoRA does not know {_some(refused)} ({shown}).")
    return tuple(sorted(unknown))


def _says_nothing(value: Any) -> bool:
    return value is None or value is False or value == {} or value == []


def check_base(config: PeftConfig, base: BaseModel) -> None:
    """Refuses an adapter that declares the fingerprint of another base model."""
    declared = config.base_model_fingerprint
    if declared and base.fingerprint and declared != base.fingerprint:
        raise _refuse(
            "base_mismatch",
            f"base_model_fingerprint is {show(declared)}, and that of {show(base.name)} is"
            f" {show(base.fingerprint)}.",
        )


def _refuse(code: str, message: str) -> AdapterRejected:
    return fault(code, f"{CONFIG_FILE}: {message}", param=CONFIG_FILE)


def load_fields(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, within limits; raises AdapterRejected."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise _refuse("config_invalid", "the file is missing.") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise _refuse("config_invalid", f"it is larger than {MAX_CONFIG_BYTES} bytes.")
    try:
        fields = strict_json.loads(data, strict_json.Bounds(100_000))
    except ValueError as error:
        raise _refuse("config_invalid", f"it is not valid JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise _refuse("config_invalid", f"it must be a JSON object and is {show(fields)}.")
    return fields


def _check_type(fields: Mapping[str, Any]) -> None:
    if fields.get("peft_type") is None:
        refuse_foreign_config(fields, CONFIG_FILE)
    if fields.get("peft_type") != "LORA":
        raise _refuse("not_lora", f"peft_type is {show(fields.get('peft_type'))} instead of 'LORA'.")


def _check_features(fields: Mapping[str, Any], base: BaseModel) -> None:
    for field, (code, is_refused, why) in REFUSED.items():
        if field == "use_dora" and base.dora and fields.get(field) is True:
            continue
        if field == "modules_to_save" and may_save(fields.get(field), base):
            continue
        if field in fields and is_refused(fields[field]):
            if field == "modules_to_save":
                why = why_not(fields[field], base) or why
            raise _refuse(code, f"{field} is {show(fields[field])}: {why}.")


def _validate(fields: Mapping[str, Any]) -> PeftConfig:
    try:
        return PeftConfig.model_validate(fields)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:120]
        found = "" if first["type"] == "missing" else f", found {show(first['input'])}"
        raise _refuse("config_invalid", f"{where}: {first['msg']}{found}.") from None


def _check_parameters(config: PeftConfig, base: BaseModel) -> None:
    """Those of experts and of linear layers are served; any other bare parameter is not."""
    if config.target_modules is None and not config.target_parameters:
        raise _refuse("config_invalid", "target_modules: Input should be a list or a string, found None.")
    if beyond := unknown_parameters(config.target_parameters or (), base):
        raise _refuse(
            "feature_unsupported",
            f"target_parameters names {_some(beyond)}; of bare parameters only weights of experts and of"
            " linear layers are served.",
        )


def _check_alpha(config: PeftConfig) -> None:
    alphas = {"lora_alpha": config.lora_alpha}
    alphas |= {f"alpha_pattern {show(key)}": alpha for key, alpha in (config.alpha_pattern or {}).items()}
    for name, alpha in alphas.items():
        if alpha == 0:
            raise _refuse("alpha_zero", f"{name} is 0.")
        if alpha < 0:
            raise _refuse("config_invalid", f"{name} is {alpha} and must be greater than 0.")


def _check_max_rank(config: PeftConfig, base: BaseModel) -> None:
    """As vLLM: the largest rank named anywhere counts, also if no module has it."""
    ranks = {"r": config.r}
    ranks |= {f"rank_pattern {show(key)}": rank for key, rank in (config.rank_pattern or {}).items()}
    name = max(ranks, key=ranks.__getitem__)
    if ranks[name] > base.max_lora_rank:
        raise _refuse(
            "rank_too_large", f"{name} is {show(ranks[name])}, and at most {base.max_lora_rank} is served."
        )


def _check_patterns(config: PeftConfig, base: BaseModel) -> None:
    fields: dict[str, Mapping[str, float]] = {
        "rank_pattern": config.rank_pattern or {},
        "alpha_pattern": config.alpha_pattern or {},
    }
    keys = {key: field for field, pattern in fields.items() for key in pattern}
    if len(keys) > MAX_PATTERN_KEYS:
        raise _refuse(
            "pattern_too_long",
            f"rank_pattern and alpha_pattern have {len(keys)} different keys, and at most {MAX_PATTERN_KEYS}"
            " are served.",
        )
    for key, field in keys.items():
        if len(key) > MAX_PATTERN_KEY:
            raise _refuse(
                "pattern_too_long",
                f"{field} has a key of {len(key)} characters, and at most {MAX_PATTERN_KEY} are served.",
            )
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", key):
            raise _refuse("pattern_not_literal", f"{field} has the key {show(key)}.")
    _check_wildcards(keys, base)


def _check_wildcards(keys: Mapping[str, str], base: BaseModel) -> None:
    """A "." in a key is any character to PEFT and vLLM; refused where that reaches another module."""
    by_length: dict[int, set[str]] = defaultdict(set)
    for module in base.modules:
        for suffix in suffixes(module):
            by_length[len(suffix)].add(suffix)
    for key, field in keys.items():
        if "." not in key:
            continue
        reads = re.compile(key).fullmatch
        other = next((suffix for suffix in by_length[len(key)] if suffix != key and reads(suffix)), None)
        if other is not None:
            raise _refuse(
                "pattern_not_literal", f"{field} has the key {show(key)}, which also matches {show(other)}."
            )


def _last_part(name: str) -> str:
    """The model in a hub id or path; QLoRA's quantized copies and hub snapshots are the model they are of."""
    *parents, last = name.rstrip("/").split("/")
    if len(parents) > 1 and parents[-1] == "snapshots":  # models--org--name/snapshots/revision
        last = parents[-2].rsplit("--", 1)[-1]
    return without_bits(last)


def _hub_id(name: str) -> str | None:
    """``org/name`` in small letters, also of a hub's snapshot; None of what may be anything by that name."""
    *parents, last = name.casefold().rstrip("/").split("/")
    if len(parents) > 1 and parents[-1] == "snapshots":
        _, *found = parents[-2].split("--")
        return "/".join(found) if len(found) == 2 else None
    return f"{parents[0]}/{last}" if len(parents) == 1 and parents[0] not in ("", ".", "..") else None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(show(name) for name in names[:5]) + more

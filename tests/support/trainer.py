"""Makes the specimens of ``zoo`` with PEFT, on random bases that are tiny, and says what each answers.

The truth is the model that was trained, in float32 and in memory: what PEFT makes of the saved files is no
part of it, so that names which PEFT itself cannot read are held against it, too.
"""

from __future__ import annotations

import copy
import functools
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners import lora
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from adapters.inspection.inspect import PREFIX
from adapters.model import CONFIG_FILE, INITIAL_FILE, WEIGHTS_FILE
from tests.support.truth import VOCABULARY, Truth, answer, word
from tests.support.zoo import DEFAULTS, LAYERS, Specimen

SOME_ROWS = [5, 41, 200]  # of the vocabulary
# Standard deviation of what an adapter adds to a layer's output, which is itself about 1.5.
EFFECT = 0.5

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.13,
    "bos_token_id": None,
    "eos_token_id": None,
}
_CONFIGS = {"llama": LlamaConfig, "qwen": Qwen2Config}


def make_base(kind: str, folder: Path) -> Base:
    """A checkpoint of ``llama`` or ``qwen``; Qwen's head is tied.

    Its tokenizer, of one word for each id, is in a folder of its own, ``tokenizer``: transformers would take
    it for Qwen's own beside Qwen's config.
    """
    return build(_CONFIGS[kind](**SIZES, tie_word_embeddings=kind == "qwen"), folder)


def build_classifier(config: Any, folder: Path) -> Path:
    """As ``build``, with a head of as many labels as ``config`` says."""
    config.pad_token_id = 0
    return build(config, folder, AutoModelForSequenceClassification).folder


def build(config: Any, folder: Path, kind: Any = AutoModelForCausalLM) -> Base:
    """A random checkpoint of ``config`` (of transformers), its tokenizer as ``make_base`` says."""
    torch.manual_seed(7)
    model = kind.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word(i): i for i in range(VOCABULARY)}, unk_token=word(0)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "tokenizer")
    return Base(folder)


@dataclass(frozen=True)
class Base:
    folder: Path

    @functools.cache  # noqa: B019  (two of them in a run)
    def _loaded(self) -> Any:
        # By the formula: transformers' other ways of attention leave out the soft caps of Gemma 2.
        return AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def fresh(self) -> Any:
        return copy.deepcopy(self._loaded())


def breed(base: Base, name: str, one: Specimen, folder: Path) -> Truth | None:
    """Trains and saves ``one`` in ``folder``, and says what it answers; None where no answer is expected."""
    torch.manual_seed(zlib.crc32(name.encode()))
    trained = WAYS[one.way](base, one, folder)
    _cast(folder, one.dtype)
    if one.style:
        config, tensors = read(folder)
        STYLES[one.style](config, tensors)
        write(folder, config, tensors)
    for path in folder.glob("README.md"):
        path.unlink()
    return None if one.code else answer(trained)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((folder / CONFIG_FILE).read_text()), load_file(folder / WEIGHTS_FILE)


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)


# --- training -------------------------------------------------------------------------------------------


def draw(model: Any, of: str = "lora_", std: float = 0.1) -> None:
    """Random numbers, in place of training, into the parameters of PEFT's ``model`` whose name has ``of``."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if of in name:
                parameter.normal_(std=std)


def _config(one: Specimen, **more: Any) -> LoraConfig:
    return LoraConfig(**(DEFAULTS | dict(one.options) | more))


def _train(model: Any, one: Specimen) -> Any:
    """Random steps: every adapted layer then adds EFFECT to its output, whatever its rank and scaling."""
    _train_rows(model)
    rounded = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(one.dtype, torch.float32)
    with torch.no_grad():
        for layer in list(model.modules()):
            if not isinstance(layer, lora.LoraLayer):
                continue
            for adapter in layer.lora_embedding_A:
                layer.lora_embedding_A[adapter].normal_(std=0.3)
                layer.lora_embedding_B[adapter].normal_(std=0.1)
            for adapter in layer.lora_A:
                a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                share = EFFECT / (abs(layer.scaling[adapter]) or 1)
                if a.any():
                    a.add_(torch.randn_like(a) * 0.2 * a.std())
                    b.add_(torch.randn_like(b) * share / a.norm())
                else:  # MiCA begins with lora_B and trains lora_A alone
                    a.add_(torch.randn_like(a) * share / b.norm() * (b.shape[0] / a.shape[1]) ** 0.5)
                for weight in (a, b):
                    weight.copy_(weight.to(rounded))
                if one.dtype == "float16 beside float32":
                    a.copy_(a.half())
                if adapter in layer.lora_magnitude_vector:
                    magnitude = layer.lora_magnitude_vector[adapter].weight
                    magnitude.mul_(1 + 0.2 * torch.randn_like(magnitude))
                    magnitude.copy_(magnitude.to(rounded))
    return model


def _train_rows(model: Any) -> None:
    """Of the vocabulary, where PEFT trains any: all that are trained alone, some of a whole layer."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".trainable_tokens_delta." in name:
                weight.add_(torch.randn_like(weight) * 0.2)
            elif ".modules_to_save." in name and weight.shape[0] == VOCABULARY:
                weight[SOME_ROWS] += torch.randn_like(weight[SOME_ROWS]) * 0.2


def _share_a(model: Any) -> Any:
    """A fused layer has one lora_A for its parts."""
    for layer in model.modules():
        for parts in _FUSED.values():
            if all(hasattr(layer, part) for part in parts):
                first, *others = (getattr(layer, part) for part in parts)
                for other in others:
                    other.lora_A["default"].weight = first.lora_A["default"].weight
    return model


def _batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, VOCABULARY, (8, 1, 24), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one} for one in ids]


def _begin(base: Base, one: Specimen, **more: Any) -> Any:
    """PEFT's model before the training; some initialisations look at data first."""
    model, config = base.fresh(), _config(one, **more)

    def run() -> None:
        for batch in _batches():
            loss = model(**batch).loss
            if config.init_lora_weights == "lora_ga":
                loss.backward()

    match config.init_lora_weights:
        case "corda":
            config.corda_config = CordaConfig()
            with torch.no_grad():
                preprocess_corda(model, config, run_model=run)
        case "lora_ga":
            config.lora_ga_config = LoraGAConfig()
            preprocess_loraga(model, config, run)
        case "eva":
            config.eva_config = lora.EvaConfig()
    made = get_peft_model(model, config)
    if config.init_lora_weights == "eva":
        lora.initialize_lora_eva_weights(made, _batches(), show_progress_bar=False)
    return made


def _plain(base: Base, one: Specimen, folder: Path, **more: Any) -> Any:
    model = _begin(base, one, **more)
    trained = _train(_share_a(model) if one.style == "fused" else model, one)
    trained.save_pretrained(folder, save_embedding_layers=False)
    return trained


def _with_config(**more: Any) -> Callable[[Base, Specimen, Path], Any]:
    return lambda base, one, folder: _plain(base, one, folder, **more)


def _of_config(base: Base, one: Specimen, folder: Path) -> None:
    """For options that need another kind of base: they are in the config alone."""
    _plain(base, Specimen(), folder)
    config, tensors = read(folder)
    write(folder, config | dict(one.options), tensors)


def _saved_before(base: Base, one: Specimen, folder: Path) -> Any:
    """As PEFT's guide to PiSSA: the weights before the training are saved in ``folder/initial``."""
    model = _begin(base, one)
    config = model.peft_config["default"]
    init, config.init_lora_weights = config.init_lora_weights, True
    model.save_pretrained(folder / "initial", save_embedding_layers=False)
    config.init_lora_weights = init
    return _train(model, one)


def _with_initial(base: Base, one: Specimen, folder: Path) -> Any:
    trained = _saved_before(base, one, folder)
    trained.save_pretrained(folder, save_embedding_layers=False)
    (folder / "initial" / WEIGHTS_FILE).rename(folder / INITIAL_FILE)
    return trained


def _converted_by_peft(base: Base, one: Specimen, folder: Path) -> Any:
    trained = _saved_before(base, one, folder)
    trained.save_pretrained(
        folder, path_initial_model_for_weight_conversion=str(folder / "initial"), save_embedding_layers=False
    )
    return trained


def _sum_of_two(combination: str) -> Callable[[Base, Specimen, Path], Any]:
    def make(base: Base, one: Specimen, folder: Path) -> Any:
        model = get_peft_model(base.fresh(), _config(one), adapter_name="first")
        model.add_adapter("second", _config(one))
        _train(model, one)
        options = {"density": 0.6} if combination == "ties" else {}
        model.add_weighted_adapter(["first", "second"], [0.7, 0.6], "both", combination, **options)
        model.set_adapter("both")
        model.save_pretrained(folder, selected_adapters=["both"], save_embedding_layers=False)
        for path in (folder / "both").iterdir():
            path.rename(folder / path.name)
        return model

    return make


def _backbone(base: Base, one: Specimen, folder: Path) -> Any:
    whole = base.fresh()
    _train(get_peft_model(whole.model, _config(one)), one).save_pretrained(folder)
    return whole


def _classifier(base: Base, one: Specimen, folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(base.folder, num_labels=2)
    _train(get_peft_model(model, _config(one)), one).save_pretrained(folder)


def _added_tokens(base: Base, one: Specimen, folder: Path) -> None:
    model = base.fresh()
    model.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    _train(get_peft_model(model, _config(one)), one).save_pretrained(folder, save_embedding_layers=True)


def _pickled(base: Base, one: Specimen, folder: Path) -> None:
    _plain(base, one, folder)
    torch.save(read(folder)[1], folder / "adapter_model.bin")
    (folder / WEIGHTS_FILE).unlink()


def _untrained(base: Base, one: Specimen, folder: Path) -> None:
    _begin(base, one).save_pretrained(folder, save_embedding_layers=False)


def _diverged(base: Base, one: Specimen, folder: Path) -> None:
    _plain(base, one, folder)
    config, tensors = read(folder)
    write(folder, config, {name: tensor * torch.nan for name, tensor in tensors.items()})


def _of_another(**sizes: int) -> Callable[[Base, Specimen, Path], None]:
    def make(base: Base, one: Specimen, folder: Path) -> None:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | sizes))
        _train(get_peft_model(model, _config(one)), one).save_pretrained(folder, save_embedding_layers=False)

    return make


def _gpt2(base: Base, one: Specimen, folder: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=2))
    _train(get_peft_model(model, _config(one)), one).save_pretrained(folder, save_embedding_layers=False)


def _tuner(base: Base, one: Specimen, folder: Path) -> None:
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[one.tuner]
    usual = {"target_modules": ["q_proj", "v_proj"], "num_virtual_tokens": 4}
    usual = {name: value for name, value in usual.items() if name in kind.__dataclass_fields__}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))  # not every tuner knows a Qwen
    model = get_peft_model(model, kind(task_type="CAUSAL_LM", **(usual | dict(one.options))))
    model.save_pretrained(folder, save_embedding_layers=False)


WAYS: dict[str, Callable[[Base, Specimen, Path], Any]] = {
    "plain": _plain,
    "of_config": _of_config,
    "with_initial": _with_initial,
    "converted": _converted_by_peft,
    "bdlora": _with_config(use_bdlora=lora.BdLoraConfig(target_modules_bd_a=["q_proj", "v_proj"], nblocks=2)),
    "kasa": _with_config(kasa_config=lora.KasaConfig()),
    "monteclora": _with_config(monteclora_config=lora.MontecloraConfig()),
    "velora": _with_config(velora_config=lora.VeloraConfig()),
    **{combination: _sum_of_two(combination) for combination in ("cat", "linear", "svd", "ties")},
    "backbone": _backbone,
    "classifier": _classifier,
    "added_tokens": _added_tokens,
    "pickled": _pickled,
    "untrained": _untrained,
    "diverged": _diverged,
    "wider": _of_another(hidden_size=256),
    "deeper": _of_another(num_hidden_layers=LAYERS + 1),
    "gpt2": _gpt2,
    "tuner": _tuner,
}


# --- how trainers save it -------------------------------------------------------------------------------

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def _cast(folder: Path, dtype: str) -> None:
    if dtype == "float32":
        return
    config, tensors = read(folder)
    if dtype == "float16 beside float32":
        write(folder, config, {name: x.half() if "lora_A" in name else x for name, x in tensors.items()})
    else:
        write(folder, config, {name: x.to(getattr(torch, dtype)) for name, x in tensors.items()})


def _renamed(*changes: tuple[str, str], **fields: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        config.update(fields)
        for name in list(tensors):
            new = name
            for old, by in changes:
                new = new.replace(old, by)
            tensors[new] = tensors.pop(name)

    return change


def _early(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    """The fields of PEFT 0.3."""
    known = {"base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights"}
    known |= {
        "lora_alpha",
        "lora_dropout",
        "modules_to_save",
        "peft_type",
        "r",
        "target_modules",
        "task_type",
    }
    for name in config.keys() - known:
        del config[name]


def _fuse(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    for fused, parts in _FUSED.items():
        for a in [name for name in tensors if f".{parts[0]}.lora_A" in name]:
            named = a.replace(parts[0], fused)
            of_a, of_b = ([a.replace(parts[0], p).replace("lora_A", side) for p in parts] for side in _SIDES)
            shared, *_ = [tensors.pop(name) for name in of_a]
            tensors[named] = shared
            tensors[named.replace("lora_A", "lora_B")] = torch.cat([tensors.pop(name) for name in of_b])
        for field in ("rank_pattern", "alpha_pattern"):
            values = {config[field].pop(part, None) for part in parts} - {None}
            config[field] |= dict.fromkeys([fused], *values) if values else {}
    config["target_modules"] = [*_FUSED, "o_proj", "down_proj"]


_SIDES = ("lora_A", "lora_B")
_UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
STYLES: dict[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    "bare": _renamed((PREFIX, "")),
    "early": _early,
    "default": _renamed((".weight", ".default.weight")),
    "my-run": _renamed((".weight", ".my-run.weight")),
    "ddp": _renamed((PREFIX, f"module.{PREFIX}")),
    "compile": _renamed((PREFIX, f"_orig_mod.{PREFIX}")),
    "compile-inside": _renamed((PREFIX, f"{PREFIX}_orig_mod.")),
    "deepspeed-compile": _renamed((PREFIX, f"module._orig_mod.{PREFIX}")),
    "fsdp": _renamed(("self_attn", "_fsdp_wrapped_module.self_attn"), ("mlp", "_fsdp_wrapped_module.mlp")),
    "checkpoint": _renamed(("self_attn", "_checkpoint_wrapped_module.self_attn")),
    "all": _renamed((PREFIX, "module._orig_mod._fsdp_wrapped_module."), (".weight", ".default.weight")),
    "unsloth": _renamed(
        target_modules=_UNSLOTH,
        base_model_name_or_path="unsloth/tiny-unsloth-bnb-4bit",
        auto_mapping={"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True},
    ),
    "llama-factory": _renamed(base_model_name_or_path="/models/tiny", inference_mode=True, loftq_config={}),
    "trl": _renamed(revision=None, peft_version="0.17.0", qalora_group_size=16),
    "fused": _fuse,
    "diffusers": _renamed(("lora_A", "lora.down"), ("lora_B", "lora.up")),
    "linear_in": _renamed(("lora_A", "adapter.linear_in"), ("lora_B", "adapter.linear_out")),
}

"""Every conversion against PEFT: what is stored answers as what was trained, on an untouched base."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import VeloraConfig
from safetensors.torch import load_file, save_file

from adapters.errors import AdapterRejected
from adapters.inspection.admit import admit
from adapters.inspection.convert import plan
from adapters.model import CONFIG_FILE, INITIAL_FILE, WEIGHTS_FILE, BaseModel
from tests.support.peft_adapters import K1, Q0, Config, Tensors, base, make_llama, read, train, write
from tests.support.spoiled import rename

__all__ = ["base"]

PREFIX = "base_model.model."
PROMPT = torch.tensor([[5, 17, 3, 88, 41]])


def answer(folder: Path) -> torch.Tensor:
    """Logits of PEFT with the adapter in ``folder`` on the base."""
    with torch.inference_mode():
        logits: torch.Tensor = PeftModel.from_pretrained(make_llama(), folder).eval()(PROMPT).logits
    return logits


def renamed(old: str, new: str) -> Callable[[Config, Tensors], Any]:
    return lambda _, tensors: rename(old, new)({}, tensors)


STYLES: dict[str, tuple[Callable[[Config, Tensors], Any], str]] = {
    "the adapter's name": (renamed(".weight", ".default.weight"), "'default'"),
    "another adapter's name": (renamed(".weight", ".my-run.weight"), "'my-run'"),
    "torch.compile": (renamed(PREFIX, f"_orig_mod.{PREFIX}"), "_orig_mod"),
    "torch.compile inside": (renamed(PREFIX, f"{PREFIX}_orig_mod."), "_orig_mod"),
    "DDP": (renamed(PREFIX, f"module.{PREFIX}"), "module"),
    "FSDP": (renamed("self_attn", "_fsdp_wrapped_module.self_attn"), "_fsdp_wrapped_module"),
    "gradient checkpointing": (
        renamed("self_attn", "_checkpoint_wrapped_module.self_attn"),
        "_checkpoint_wrapped_module",
    ),
    "all of them, without PEFT's prefix": (
        lambda c, t: [
            rename(PREFIX, "module._orig_mod._fsdp_wrapped_module.")(c, t),
            rename(".weight", ".default.weight")(c, t),
        ],
        "_fsdp_wrapped_module, _orig_mod, module",
    ),
    "a bare backbone": (renamed(f"{PREFIX}model.", PREFIX), "bare backbone"),
}


@pytest.fixture(scope="module")
def patterned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(
        tmp_path_factory.mktemp("patterned"),
        rank_pattern={"k_proj": 3, K1: 2},
        alpha_pattern={"layers.0.self_attn.q_proj": 5},
        use_rslora=True,
    )


@pytest.mark.parametrize("style", STYLES)
def test_a_trainers_names_become_pefts(style: str, patterned: Path, base: BaseModel, tmp_path: Path) -> None:
    change, says = STYLES[style]
    config, tensors = read(patterned)
    expected = dict(tensors)
    change(config, tensors)
    manifest = admit(
        write(tmp_path, config, tensors), base, original_digest="before", serving_dtype="float32"
    )
    assert any(says in note for note in manifest.conversions), manifest.conversions
    assert manifest.original_digest == "before"
    stored = load_file(tmp_path / WEIGHTS_FILE)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    assert torch.equal(answer(tmp_path), answer(patterned))
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o444 for path in tmp_path.iterdir())


def test_what_velora_saves_for_training_is_left_out(base: BaseModel, tmp_path: Path) -> None:
    folder = train(tmp_path, velora_config=VeloraConfig(num_groups=16))
    expected = {name: x for name, x in load_file(folder / WEIGHTS_FILE).items() if "velora" not in name}
    before = answer(folder)
    (note,) = admit(folder, base).conversions
    assert note.endswith("were left out: 4")
    stored = load_file(folder / WEIGHTS_FILE)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    assert torch.equal(answer(folder), before)


@pytest.mark.parametrize("bare", [False, True])
def test_what_can_be_served_as_it_is_stays_as_it_is(
    bare: bool, patterned: Path, base: BaseModel, tmp_path: Path
) -> None:
    config, tensors = read(patterned)
    if bare:
        rename(PREFIX, "")(config, tensors)
    folder = write(tmp_path, config, tensors)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    manifest = admit(folder, base, original_digest="before")
    assert (manifest.conversions, manifest.original_digest) == ((), None)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


# --- fused ----------------------------------------------------------------------------------------------

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def fuse(config: Config, tensors: Tensors) -> None:
    """Parts that share a lora_A become one layer, with the first part's keys in the patterns."""
    for fused, parts in FUSED.items():
        firsts = [name for name in tensors if f".{parts[0]}.lora_A" in name]
        for a in firsts:
            names = [a.replace(parts[0], part) for part in parts]
            together = [tensors.pop(name.replace("lora_A", "lora_B")) for name in names]
            shared = tensors.pop(a)
            for name in names[1:]:
                del tensors[name]
            tensors[a.replace(parts[0], fused)] = shared
            tensors[a.replace(parts[0], fused).replace("lora_A", "lora_B")] = torch.cat(together)
        for field in ("rank_pattern", "alpha_pattern"):
            pattern = config.get(field) or {}
            config[field] = {key.replace(parts[0], fused): value for key, value in pattern.items()}
    config["target_modules"] = [*FUSED, "o_proj"]


def tie(tensors: Tensors) -> None:
    for parts in FUSED.values():
        for name in [name for name in tensors if f".{parts[0]}.lora_A" in name]:
            for part in parts[1:]:
                tensors[name.replace(parts[0], part)] = tensors[name].clone()


def test_an_upload_that_needs_no_conversion_is_read_once(
    patterned: Path, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    open_file = Path.open

    def counting(path: Path, *args: Any, **options: Any) -> Any:
        opened.append(path.name)
        return open_file(path, *args, **options)

    monkeypatch.setattr(Path, "open", counting)
    assert admit(patterned, base).conversions == ()
    assert sorted(opened) == [CONFIG_FILE, WEIGHTS_FILE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_layer_is_split_into_its_parts(dtype: torch.dtype, base: BaseModel, tmp_path: Path) -> None:
    parts = [part for of in FUSED.values() for part in of]
    patterns = {"rank_pattern": dict.fromkeys(("layers.1.self_attn." + p for p in FUSED["qkv_proj"]), 6)}
    patterns["alpha_pattern"] = dict.fromkeys(FUSED["gate_up_proj"], 3)
    split = train(tmp_path / "split", dtype, target_modules=[*parts, "o_proj"], **patterns)
    config, tensors = read(split)
    tie(tensors)
    write(split, config, tensors)
    fuse(config, tensors)
    config["rank_pattern"] = {"layers.1.self_attn.qkv_proj": 6}
    config["alpha_pattern"] = {"gate_up_proj": 3}
    manifest = admit(write(tmp_path / "fused", config, tensors), base)
    assert [note.split(",")[0] for note in manifest.conversions] == [
        "gate_up_proj was split into gate_proj",
        "qkv_proj was split into q_proj",
    ]
    assert manifest.target_modules == tuple(sorted([*parts, "o_proj"]))
    stored, expected = load_file(tmp_path / "fused" / WEIGHTS_FILE), load_file(split / WEIGHTS_FILE)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    assert torch.equal(answer(tmp_path / "fused"), answer(split))


@pytest.mark.parametrize("style", ["split", "fused"])
def test_names_of_another_release_become_the_checkpoints(style: str, base: BaseModel, tmp_path: Path) -> None:
    """As of a multimodal base: its layers have had two names, and a text model knows them by a third."""
    key = "model.layers.1.self_attn.o_proj"
    targets = [part for of in FUSED.values() for part in of] + ["o_proj"]
    config, tensors = read(train(tmp_path / "trained", target_modules=targets, rank_pattern={key: 2}))
    if style == "fused":
        tie(tensors)
        fuse(config, tensors)
    renamed = {f"model.language_{name}": shape for name, shape in base.modules.items()}
    served = replace(base, modules=renamed, aliases={name: f"model.language_{name}" for name in base.modules})
    manifest = admit(write(tmp_path / "upload", config, tensors), served)
    assert any("renamed as the served checkpoint" in note for note in manifest.conversions)
    assert all(name.startswith("model.language_model.layers.") for name in manifest.modules)
    stored, _ = read(tmp_path / "upload")
    assert stored["rank_pattern"] == {f"model.language_{key}": 2}


# --- initial weights ------------------------------------------------------------------------------------


def train_on_changed_base(folder: Path, **config: Any) -> torch.Tensor:
    """Saves what PEFT's guide to PiSSA saves before and after a training; returns the trained logits."""
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(make_llama(), LoraConfig(**(options | config)))
    chosen = model.peft_config["default"].init_lora_weights
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder / "initial", save_embedding_layers=False)
    model.peft_config["default"].init_lora_weights = chosen
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder / "trained", save_embedding_layers=False)
    (folder / "trained" / "README.md").unlink()
    (folder / "initial" / WEIGHTS_FILE).rename(folder / "trained" / INITIAL_FILE)
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(PROMPT).logits
    return logits


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "PiSSA"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 4}}],
    ids=["plain", "rslora", "patterns"],
)
def test_initial_weights_make_a_plain_lora(
    init: str, options: dict[str, Any], base: BaseModel, tmp_path: Path
) -> None:
    logits = train_on_changed_base(tmp_path, init_lora_weights=init.lower(), **options)
    folder = tmp_path / "trained"
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"init_lora_weights": init}))
    manifest = admit(folder, base, serving_dtype="float32")
    assert "initial weights were subtracted" in manifest.conversions[0]
    assert manifest.rank == 8
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert torch.allclose(answer(folder), logits, atol=1e-4)
    with torch.inference_mode():
        assert not torch.allclose(make_llama().eval()(PROMPT).logits, logits, atol=1e-2)


# --- refusals -------------------------------------------------------------------------------------------


def fused_rows(config: Config, tensors: Tensors) -> None:
    rename("q_proj", "qkv_proj")(config, tensors)
    config["target_modules"] = ["qkv_proj", "k_proj"]


REFUSED: dict[str, tuple[str, str, Callable[[Config, Tensors], Any]]] = {
    "two adapters": ("tensor_unknown", "2 adapters", renamed(f"{K1}.lora_A", f"{K1}.lora_A.other")),
    "one of them without a name": (
        "tensor_unknown",
        "2 adapters",
        renamed("q_proj.lora_A", "q_proj.lora_A.d"),
    ),
    "the same tensor twice": (
        "weights_invalid",
        "the same tensor",
        lambda c, t: t.update({f"module.{name}": tensor.clone() for name, tensor in t.items()}),
    ),
    "fused and its part": (
        "weights_invalid",
        "the same layer",
        lambda c, t: [
            t.update(
                {name.replace("q_proj", "qkv_proj"): x.clone() for name, x in t.items() if "q_proj" in name}
            ),
            c.update(target_modules=["qkv_proj", "q_proj", "k_proj"]),
        ],
    ),
    "fused with the rows of one part": (
        "shape_mismatch",
        "(128, rank) for q_proj, k_proj, v_proj",
        lambda c, t: [fused_rows(c, t), [t.pop(name) for name in list(t) if "k_proj" in name]],
    ),
    "fused and not targeted": (
        "target_mismatch",
        "qkv_proj",
        lambda c, t: [fused_rows(c, t), c.update(target_modules=["k_proj"])],
    ),
    "DoRA's magnitude with a name": (
        "dora_unsupported",
        "magnitude",
        lambda c, t: [
            rename(".weight", ".default.weight")(c, t),
            t.update({f"{PREFIX}{Q0}.lora_magnitude_vector.default.weight": torch.ones(64)}),
        ],
    ),
    "an unknown module in wrappers": (
        "module_unknown",
        "layers.7",
        lambda c, t: [rename("layers.1.", "layers.7.")(c, t), rename(PREFIX, "_orig_mod.")(c, t)],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_conversion_helps_is_refused(
    name: str, patterned: Path, base: BaseModel, tmp_path: Path
) -> None:
    code, says, change = REFUSED[name]
    config, tensors = read(patterned)
    config |= {"rank_pattern": {"k_proj": 3, K1: 2}}
    change(config, tensors)
    folder = write(tmp_path, config, tensors)
    with pytest.raises(AdapterRejected) as caught:
        plan(folder, base)
    assert caught.value.code == code, caught.value.message
    assert says in caught.value.message


def test_no_part_gets_another_rank_or_alpha(base: BaseModel, tmp_path: Path) -> None:
    """A key for q_proj in one layer must not reach the q_proj that comes out of another's qkv_proj."""
    config, tensors = read(train(tmp_path / "a", target_modules=["q_proj", "k_proj", "v_proj"]))
    tie(tensors)
    fuse(config, tensors)
    config |= {"target_modules": ["qkv_proj"], "alpha_pattern": {"q_proj": 99}}
    with pytest.raises(AdapterRejected, match="another rank or alpha") as caught:
        plan(write(tmp_path / "b", config, tensors), base)
    assert caught.value.code == "module_fused"


INITIAL: dict[str, tuple[str, Callable[[Config, Tensors], Any]]] = {
    "not needed": ("unexpected_file", lambda c, t: c.update(init_lora_weights="gaussian")),
    "not needed by default": ("unexpected_file", lambda c, t: c.pop("init_lora_weights")),
    "of another rank": ("shape_mismatch", lambda c, t: t.update({n: x[:, :2] for n, x in t.items()})),
    "of other modules": ("tensor_unpaired", lambda c, t: t.pop(next(iter(t)))),
    "of the trained weights": ("adapter_no_effect", lambda c, t: None),
}


@pytest.mark.parametrize("name", INITIAL)
def test_initial_weights_that_do_not_fit_are_refused(
    name: str, patterned: Path, base: BaseModel, tmp_path: Path
) -> None:
    code, change = INITIAL[name]
    config, tensors = read(patterned)
    write(tmp_path, config | {"init_lora_weights": "pissa"}, tensors)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    change(config, tensors)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    save_file({n: x.contiguous() for n, x in tensors.items()}, tmp_path / INITIAL_FILE)
    with pytest.raises(AdapterRejected) as caught:
        admit(tmp_path, base)
    assert caught.value.code == code, caught.value.message

"""Adapters on experts: what vLLM's stacked tensors hold is what PEFT adds to each expert, or it is refused.

The CPU build has no kernels for a mixture of experts with LoRA, so this ends at the tensors that they read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper

from adapters.errors import AdapterRejected
from adapters.inspection.admit import admit
from adapters.inspection.base_model import read_base
from adapters.model import CONFIG_FILE, WEIGHTS_FILE, BaseModel, ModuleShape
from adapters.offline.doctor import diagnose
from adapters.offline.merge import Merge, MergeError
from adapters.worker.experts import expert_shapes, has_stacked_experts
from adapters.worker.names import names_of
from tests.support.trainer import draw

EXPERTS, HIDDEN, INNER, RANK, SLOTS = 4, 32, 24, 3, 2
LAYER = "model.layers.0.mlp.experts"
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PREFIX = "base_model.model."
# What the smallest models of all three families have.
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
}


def make_model() -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SMALL,
        hidden_size=HIDDEN,
        intermediate_size=48,
        moe_intermediate_size=INNER,
        num_experts=EXPERTS,
        decoder_sparse_step=1,
    )
    return Qwen3MoeForCausalLM(config)


def make_mixtral() -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        **SMALL,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_local_experts=EXPERTS,
    )
    return MixtralForCausalLM(config)


def make_gpt_oss() -> Any:
    torch.manual_seed(0)
    config = GptOssConfig(
        **SMALL,
        hidden_size=HIDDEN - 8,
        intermediate_size=INNER - 8,
        num_local_experts=EXPERTS,
        layer_types=["full_attention"],
    )
    return GptOssForCausalLM(config)


def apart(layer: str = LAYER, names: tuple[str, ...] = ("gate_proj", "down_proj", "up_proj")) -> list[str]:
    """As ``packed_modules`` lists them."""
    return [f"{layer}.{expert}.{name}" for expert in range(EXPERTS) for name in names]


def tables(*, three_dimensional: bool = False, model: str = "Qwen3MoeForCausalLM") -> Any:
    return SimpleNamespace(
        _enable_mixed_moe_lora_format=not three_dimensional,
        _is_3d_moe_model=three_dimensional,
        packed_modules={} if three_dimensional else {LAYER: apart()},
        model=SimpleNamespace(config=SimpleNamespace(architectures=[model])),
        _get_lora_layer_weights=lambda lora, name: lora.get_lora(name),
    )


class Experts:
    """As much of vLLM's layer as holds weights; it is asked for itself, not for what it wraps."""

    hidden_size, global_num_experts, local_num_experts = HIDDEN, EXPERTS, EXPERTS
    intermediate_size_per_partition, tp_size, ep_rank, _w13_slices = INNER, 1, 0, 2
    use_ep = False
    set_lora: Callable[..., None] = FusedMoEWithLoRA.set_lora
    reset_lora = _match_expert_dim = lambda self, *given: given[0]

    def __init__(self) -> None:
        def zeros(out: int, into: int) -> torch.Tensor:
            return torch.zeros(SLOTS, EXPERTS, out, into)

        self.adapter_enabled = torch.zeros(SLOTS + 1)
        self.w13_lora_a_stacked = (zeros(8, HIDDEN), zeros(8, HIDDEN))
        self.w13_lora_b_stacked = (zeros(INNER, 8), zeros(INNER, 8))
        self.w2_lora_a_stacked, self.w2_lora_b_stacked = (zeros(8, INNER),), (zeros(HIDDEN, 8),)

    def _slice(self, weights: torch.Tensor) -> torch.Tensor:
        return weights

    _slice_w13_a = _slice_w13_b = _slice_w2_a = _slice_w2_b = _slice


class RealExperts(FusedMoEWithLoRA):  # type: ignore[misc]
    """Passes for vLLM's layer where that is asked for."""

    hidden_size, global_num_experts = HIDDEN, EXPERTS
    intermediate_size_per_partition = INNER

    def __init__(self, *, gated: bool = True, workers: int = 1, rounded: int = 0) -> None:
        """``rounded``: by how much vLLM made both sizes larger."""
        torch.nn.Module.__init__(self)
        self.tp_size = workers
        self.moe_config = SimpleNamespace(
            is_act_and_mul=gated,
            hidden_dim_unpadded=HIDDEN - rounded,
            intermediate_size_per_partition_unpadded=INNER - rounded,
        )


@pytest.fixture(scope="module")
def base() -> BaseModel:
    shapes = expert_shapes(tables(), LAYER, RealExperts())
    modules = {name: ModuleShape(*shape) for name, shape in shapes.items()}
    modules["model.layers.0.self_attn.q_proj"] = ModuleShape(HIDDEN, 32)
    return BaseModel("tiny-moe", modules, max_lora_rank=8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An adapter with stacked experts, and PEFT's model."""
    config = LoraConfig(
        r=RANK,
        lora_alpha=5,
        use_rslora=True,
        target_modules=["q_proj"],
        target_parameters=PARAMETERS,
        rank_pattern={"experts.down_proj": 2},
        alpha_pattern={"experts.gate_up_proj": 7},
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(make_model(), config)
    draw(model)
    folder = tmp_path_factory.mktemp("stacked")
    model.save_pretrained(folder)
    return folder, model


def added(model: Any) -> dict[str, torch.Tensor]:
    """What PEFT adds to each of the layer's two parameters, by name."""
    outer = model.base_model.model.get_submodule(LAYER)
    return {one.parameter_name: one.get_delta_weight("default").detach() for one in (outer, outer.base_layer)}


def deltas(model: Any) -> dict[str, torch.Tensor]:
    """Projection -> (experts, out, in) that PEFT adds to the weights."""
    found = added(model)
    gate, up = found["gate_up_proj"].chunk(2, dim=1)
    return {"gate_proj": gate, "up_proj": up, "down_proj": found["down_proj"]}


def loaded(folder: Path) -> LoRAModel:
    """By vLLM's own code, as a worker does it."""
    expected = {*apart(), *ATTENTION, "gate", "experts", "experts.base_layer"}
    expected |= {name.partition("mlp.")[2] for name in apart()}
    helper = PEFTHelper.from_local_dir(str(folder), None)
    lora = LoRAModel.from_local_checkpoint(
        str(folder), expected, helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )
    for one in lora.loras.values():
        one.optimize()
    return lora


def check(layer: Experts, wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference."""
    a, b = layer.w13_lora_a_stacked, layer.w13_lora_b_stacked
    got = {"gate_proj": b[0][1] @ a[0][1], "up_proj": b[1][1] @ a[1][1]}
    got["down_proj"] = layer.w2_lora_b_stacked[0][1] @ layer.w2_lora_a_stacked[0][1]
    for name, delta in wanted.items():
        assert torch.allclose(got[name], delta, atol=1e-6), name
        assert delta.abs().max() > 0.01
    return max((got[name] - delta).abs().max().item() for name, delta in wanted.items())


def test_stacked_experts_are_what_peft_adds(trained: tuple[Path, Any], base: BaseModel) -> None:
    folder, model = trained
    manifest = admit(folder, base, serving_dtype="float32")
    assert manifest.rank == RANK
    assert {f"{LAYER}.base_layer", LAYER} <= set(manifest.modules)
    assert has_stacked_experts(str(folder))
    lora, layer = loaded(folder), Experts()
    LoRAModelManager._convert_3d_to_2d_moe_lora(tables(), lora, layer, LAYER)
    made = lora.get_lora(LAYER)
    layer.set_lora(1, made.lora_a, made.lora_b)
    wanted = deltas(model)
    print(f"| Qwen3-MoE, target_parameters | what slots hold | {check(layer, wanted):.1e} |")
    (down,) = (row for row in manifest.coverage if row.module == "mlp.experts")
    assert down.norm[0] == pytest.approx(wanted["down_proj"].norm().item(), rel=1e-4)


MIXTRAL_LAYER = "model.layers.0.block_sparse_moe.experts"
# PEFT's own recipes: what is asked for, of which model, and vLLM's name of the layer.
RECIPES: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "Qwen3-MoE, all-linear": (make_model, "all-linear", LAYER),
    "Qwen3-MoE, the list of seven": (make_model, [*ATTENTION, "gate_proj", "up_proj", "down_proj"], LAYER),
    "Mixtral, all-linear": (make_mixtral, "all-linear", MIXTRAL_LAYER),
    "Mixtral, projections": (make_mixtral, ["q_proj", "w1", "w2", "w3"], MIXTRAL_LAYER),
}


def base_with(layer: str, model_type: str) -> BaseModel:
    """As a worker describes a base with attention, a router and experts."""
    block = layer.removesuffix(".experts")
    parts = apart() if layer == LAYER else apart(layer, ("w1", "w2", "w3"))
    shapes = expert_shapes(
        SimpleNamespace(**{**vars(tables()), "packed_modules": {layer: parts}}), layer, RealExperts()
    )
    shapes |= {f"model.layers.0.self_attn.{name}": [HIDDEN, 32] for name in ATTENTION}
    shapes[f"{block}.gate"] = [HIDDEN, EXPERTS]
    names = names_of(list(shapes), None, model_type=model_type)
    modules = {name: ModuleShape(*shapes[module]) for module, name in names.canonical.items()}
    return BaseModel("tiny-moe", modules, max_lora_rank=8, aliases=names.aliases)


def trained_by(recipe: str, folder: Path, **changed: Any) -> tuple[Any, BaseModel, str]:
    """PEFT's model, saved in ``folder``; the base that serves it, and the layer with experts there."""
    make, targets, layer = RECIPES[recipe]
    config = LoraConfig(r=RANK, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM", **changed)
    model = get_peft_model(make(), config)
    draw(model)
    model.save_pretrained(folder)
    return model, base_with(layer, model.config.model_type), layer


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_peft_makes_of_its_own_recipes_is_served_as_there(recipe: str, tmp_path: Path) -> None:
    model, base, layer = trained_by(recipe, tmp_path)
    manifest = admit(tmp_path, base, serving_dtype="float32")
    assert manifest.rank == 2 * RANK  # of gate and up together
    assert {layer, f"{layer}.base_layer"} <= set(manifest.modules)
    assert not [warning for warning in manifest.warnings if "pattern" in warning]
    assert "expressions became the names" in " ".join(manifest.conversions)
    lora, experts = loaded(tmp_path), Experts()
    LoRAModelManager._convert_3d_to_2d_moe_lora(tables(), lora, experts, layer)
    experts.set_lora(1, lora.get_lora(layer).lora_a, lora.get_lora(layer).lora_b)
    print(f"| {recipe} | what slots hold | {check(experts, deltas(model)):.1e} |")
    router = lora.get_lora(f"{layer.removesuffix('.experts')}.gate")
    assert (router is not None) == ("all-linear" in recipe)
    if router is not None:
        gate = model.base_model.model.get_submodule("model.layers.0.mlp.gate")
        wanted = gate.get_delta_weight("default")
        assert torch.allclose(router.lora_b @ router.lora_a, wanted, atol=1e-6)
        assert wanted.abs().max() > 0.01
    # What is kept is read again at each start.
    assert admit(tmp_path, base, serving_dtype="float32").conversions == ()


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("recipe", RECIPES)
def test_offline_tools_know_a_mixture_as_the_server_does(recipe: str, tmp_path: Path) -> None:
    make, _, _ = RECIPES[recipe]
    make().save_pretrained(tmp_path / "base")
    model, served, _ = trained_by(recipe, tmp_path / "adapter")
    base = read_base(tmp_path / "base", max_lora_rank=8)
    assert base.modules == served.modules
    assert base.aliases.items() <= served.aliases.items()
    assert not base.dora
    found = diagnose(tmp_path / "adapter", base)
    assert found.manifest is not None
    with Merge(tmp_path / "base", base, tmp_path / "adapter", tmp_path / "out") as merging:
        assert merging.run() == len(found.manifest.modules) - 2 + 3 * EXPERTS
        merging.keep()
    tokens = torch.arange(20)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.inference_mode():
        wanted, got = model.eval()(tokens).logits, merged.eval()(tokens).logits
        with model.disable_adapter():
            plain = model(tokens).logits
    assert torch.allclose(got, wanted, atol=1e-5)
    print(f"| {recipe} | logits of the merged model | {(got - wanted).abs().max():.1e} |")
    assert (plain - wanted).abs().max() > 1e-3


def test_shared_experts_and_their_gate_are_layers_like_others(tmp_path: Path) -> None:
    """Under the names of older releases: PEFT on transformers 5 takes these projections for the experts'."""
    config = Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=48,
        moe_intermediate_size=INNER,
        shared_expert_intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    base = read_base(tmp_path / "base", max_lora_rank=8)
    names = [
        "shared_expert.gate_proj",
        "shared_expert.up_proj",
        "shared_expert.down_proj",
        "shared_expert_gate",
    ]
    tensors = {}
    for name in names:
        shape = base.modules[f"model.layers.0.mlp.{name}"]
        stem = f"{PREFIX}model.layers.0.mlp.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, shape.in_features) / 10
        tensors[f"{stem}.lora_B.weight"] = torch.randn(shape.out_features, RANK) / 10
    assert shape.out_features == 1
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": names}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / CONFIG_FILE).write_text(json.dumps(fields))
    save_file(tensors, tmp_path / "adapter" / WEIGHTS_FILE)
    assert len(admit(tmp_path / "adapter", base).modules) == len(names)
    with Merge(tmp_path / "base", base, tmp_path / "adapter", tmp_path / "out") as merging:
        assert merging.run() == len(names)
        merging.keep()
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.0.mlp.{name}.weight" for name in names}
    gate = "model.layers.0.mlp.shared_expert_gate"
    a, b = (tensors[f"{PREFIX}{gate}.lora_{side}.weight"] for side in "AB")
    assert torch.allclose(after[f"{gate}.weight"], before[f"{gate}.weight"] + 2 * b @ a)


def test_experts_that_a_checkpoint_keeps_together_are_left_to_peft(tmp_path: Path) -> None:
    make_gpt_oss().save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=RANK, lora_alpha=5, target_modules=["q_proj"], target_parameters=PARAMETERS, init_lora_weights=False
    )
    get_peft_model(make_gpt_oss(), config).save_pretrained(tmp_path / "adapter")
    base = read_base(tmp_path / "base", max_lora_rank=8)
    assert base.modules[f"{LAYER}.base_layer"] == ModuleShape(HIDDEN - 8, 2 * (INNER - 8), EXPERTS)
    found = diagnose(tmp_path / "adapter", base)
    assert found.error is None
    with (
        Merge(tmp_path / "base", base, tmp_path / "adapter", tmp_path / "out") as merging,
        pytest.raises(MergeError, match="merge_and_unload"),
    ):
        merging.run()


@pytest.mark.parametrize("alone", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("recipe", ["Qwen3-MoE, all-linear", "Mixtral, all-linear"])
def test_one_projection_alone_gets_zeros_beside_it(recipe: str, alone: str, tmp_path: Path) -> None:
    """PEFT calls its pair the same, whichever it is."""
    make, _, layer = RECIPES[recipe]
    config = LoraConfig(r=RANK, lora_alpha=5, target_modules=["q_proj"], target_parameters=[alone])
    model = get_peft_model(make(), config)
    draw(model)
    model.save_pretrained(tmp_path)
    base = base_with(layer, model.config.model_type)
    manifest = admit(tmp_path, base, serving_dtype="float32")
    assert manifest.modules == (layer, f"{layer}.base_layer", "model.layers.0.self_attn.q_proj")
    assert "a pair of zeros" in " ".join(manifest.conversions)
    lora, experts = loaded(tmp_path), Experts()
    LoRAModelManager._convert_3d_to_2d_moe_lora(tables(), lora, experts, layer)
    experts.set_lora(1, lora.get_lora(layer).lora_a, lora.get_lora(layer).lora_b)
    delta = model.base_model.model.get_submodule(LAYER).get_delta_weight("default").detach()
    a, b = experts.w13_lora_a_stacked, experts.w13_lora_b_stacked
    gate_up = torch.cat([b[0][1] @ a[0][1], b[1][1] @ a[1][1]], dim=1)
    down = experts.w2_lora_b_stacked[0][1] @ experts.w2_lora_a_stacked[0][1]
    served, other = (gate_up, down) if alone == "gate_up_proj" else (down, gate_up)
    assert torch.allclose(served, delta, atol=1e-6)
    assert delta.abs().max() > 0.01
    assert not other.any()


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_a_router_has_the_rank_and_alpha_that_peft_gave_it(tmp_path: Path) -> None:
    """PEFT knows it as a weight in the patterns, and vLLM as a layer."""
    changed = {"rank_pattern": {"mlp.gate.weight": 2}, "alpha_pattern": {"gate.weight": 9.0}}
    model, base, _ = trained_by("Qwen3-MoE, all-linear", tmp_path, **changed)
    admit(tmp_path, base, serving_dtype="float32")
    router = loaded(tmp_path).get_lora("model.layers.0.mlp.gate")
    gate = model.base_model.model.get_submodule("model.layers.0.mlp.gate")
    assert gate.scaling == {"default": 4.5}
    assert torch.allclose(router.lora_b @ router.lora_a, gate.get_delta_weight("default"), atol=1e-6)


def test_a_key_that_means_another_layer_to_vllm_is_refused(tmp_path: Path) -> None:
    """To PEFT "gate" does not match the parameter "gate.weight"; to vLLM it matches the layer."""
    with pytest.warns(RuntimeWarning, match="alpha_pattern"):
        _, base, _ = trained_by("Qwen3-MoE, all-linear", tmp_path, alpha_pattern={"gate": 9.0})
    with pytest.raises(AdapterRejected, match="another rank or alpha"):
        admit(tmp_path, base)


def unstacked(folder: Path, into: Path) -> Path:
    """The same adapter as a linear layer for each expert, as older releases of transformers have them."""
    config, tensors = json.loads((folder / CONFIG_FILE).read_text()), load_file(folder / WEIGHTS_FILE)
    split = {name: tensor for name, tensor in tensors.items() if "experts" not in name}
    for inner, names in ((".base_layer", ("gate_proj", "up_proj")), ("", ("down_proj",))):
        a, b = (tensors[f"{PREFIX}{LAYER}{inner}.lora_{side}.weight"] for side in "AB")
        for expert, part in enumerate(a.chunk(EXPERTS)):
            of_b = b.reshape(b.shape[0], -1, EXPERTS)[:, :, expert].chunk(len(names))
            for name, rows in zip(names, of_b, strict=True):
                split[f"{PREFIX}{LAYER}.{expert}.{name}.lora_A.weight"] = part.clone()
                split[f"{PREFIX}{LAYER}.{expert}.{name}.lora_B.weight"] = rows.contiguous()
    config |= {
        "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
        "target_parameters": None,
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"gate_proj": 7, "up_proj": 7},
    }
    into.mkdir()
    (into / CONFIG_FILE).write_text(json.dumps(config))
    save_file(split, into / WEIGHTS_FILE)
    return into


def test_experts_apart_are_what_peft_adds(trained: tuple[Path, Any], base: BaseModel, tmp_path: Path) -> None:
    from vllm.lora.lora_weights import PackedLoRALayerWeights

    folder = unstacked(trained[0], tmp_path / "apart")
    assert len(admit(folder, base, serving_dtype="float32").modules) == 3 * EXPERTS + 1
    assert not has_stacked_experts(str(folder))
    lora, layer = loaded(folder), Experts()
    packed = PackedLoRALayerWeights.pack_moe([lora.get_lora(name) for name in apart()], LAYER)
    packed.optimize()
    layer.set_lora(1, packed.lora_a, packed.lora_b)
    print(
        f"| Qwen3-MoE, a layer for each expert | what slots hold | {check(layer, deltas(trained[1])):.1e} |"
    )


def _add_one_apart(_: dict[str, Any], tensors: dict[str, Any]) -> None:
    name = f"{PREFIX}{LAYER}.0.gate_proj.lora"
    tensors[f"{name}_A.weight"] = torch.ones(RANK, HIDDEN)
    tensors[f"{name}_B.weight"] = torch.ones(INNER, RANK)


BAD: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str, str]] = {
    "down_proj is left out": (
        lambda c, t: [t.pop(name) for name in list(t) if f"{LAYER}.lora_" in name],
        "experts_incomplete",
        "is not adapted beside",
    ),
    "both forms": (
        _add_one_apart,
        "experts_incomplete",
        "some apart",
    ),
    "not targeted": (
        lambda c, t: c.update(target_parameters=PARAMETERS[:1]),
        "target_mismatch",
        "leave out",
    ),
    "of fewer experts": (
        lambda c, t: t.update({n: x[: -RANK] for n, x in t.items() if "base_layer.lora_A" in n}),
        "rank_mismatch",
        "rank",
    ),
    "another parameter": (
        lambda c, t: c.update(target_parameters=[*PARAMETERS, "mlp.gate.e_score_correction_bias"]),
        "feature_unsupported",
        "mlp.gate.e_score_correction_bias",
    ),
    "another expression": (
        lambda c, t: c.update(rank_pattern={".*gate_up_proj": 6}),
        "pattern_not_literal",
        "gate_up_proj",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_vllm_would_serve_in_part_is_refused(
    kind: str, trained: tuple[Path, Any], base: BaseModel, tmp_path: Path
) -> None:
    change, code, says = BAD[kind]
    config, tensors = json.loads((trained[0] / CONFIG_FILE).read_text()), load_file(trained[0] / WEIGHTS_FILE)
    change(config, tensors)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    save_file({name: x.contiguous() for name, x in tensors.items()}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(AdapterRejected, match=says) as refused:
        admit(tmp_path, base)
    assert refused.value.code == code


@pytest.mark.parametrize("kind", ["one expert is left out", "another rank"])
def test_experts_apart_are_all_there_and_alike(
    kind: str, trained: tuple[Path, Any], base: BaseModel, tmp_path: Path
) -> None:
    folder = unstacked(trained[0], tmp_path / "apart")
    config, tensors = json.loads((folder / CONFIG_FILE).read_text()), load_file(folder / WEIGHTS_FILE)
    names = [name for name in tensors if ".experts.2.up_proj." in name]
    if kind == "another rank":
        config["rank_pattern"] = {"experts.2.up_proj": 2, "down_proj": 2}
        for name in names:
            tensors[name] = tensors[name][:2] if "lora_A" in name else tensors[name][:, :2]
    else:
        for name in names:
            del tensors[name]
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterRejected) as refused:
        admit(folder, base)
    assert refused.value.code == "experts_incomplete"


def test_which_forms_a_layer_takes() -> None:
    assert len(expert_shapes(tables(), LAYER, RealExperts())) == 2 + 3 * EXPERTS
    assert set(expert_shapes(tables(three_dimensional=True), LAYER, RealExperts())) == {
        LAYER,
        f"{LAYER}.base_layer",
    }
    assert expert_shapes(tables(), LAYER, RealExperts(gated=False)) == {}
    assert expert_shapes(tables(), LAYER, object()) == {}
    assert expert_shapes(tables(), LAYER, RealExperts(workers=2))[LAYER] == [2 * INNER, HIDDEN, EXPERTS]
    assert issubclass(FusedMoE3DWithLoRA, FusedMoEWithLoRA)


def test_sizes_are_the_checkpoints_where_vllm_rounds_them_up() -> None:
    """As of GPT-OSS in MXFP4, whose kernels want multiples: an adapter is as PEFT made it."""
    shapes = expert_shapes(tables(three_dimensional=True), LAYER, RealExperts(rounded=8))
    assert shapes == {
        f"{LAYER}.base_layer": [HIDDEN - 8, 2 * (INNER - 8), EXPERTS],
        LAYER: [INNER - 8, HIDDEN - 8, EXPERTS],
    }
    assert expert_shapes(tables(), LAYER, RealExperts(rounded=8, workers=2)) == {}


def gpt_oss_trained(folder: Path) -> Any:
    """PEFT's model of GPT-OSS with experts adapted, saved in ``folder``."""
    config = LoraConfig(
        r=RANK, lora_alpha=5, target_modules=["q_proj"], target_parameters=PARAMETERS, task_type="CAUSAL_LM"
    )
    model = get_peft_model(make_gpt_oss(), config)
    draw(model)
    model.save_pretrained(folder)
    return model


def test_experts_of_gpt_oss_whose_gate_and_up_take_turns(tmp_path: Path) -> None:
    """In slots that vLLM rounded up by 8: what follows the adapter's own sizes stays zero."""
    model = gpt_oss_trained(tmp_path)
    shapes = expert_shapes(tables(three_dimensional=True), LAYER, RealExperts(rounded=8))
    shapes["model.layers.0.self_attn.q_proj"] = [HIDDEN - 8, 32]
    modules = {name: ModuleShape(*shape) for name, shape in shapes.items()}
    assert set(admit(tmp_path, BaseModel("tiny-oss", modules, max_lora_rank=8)).modules) == set(modules)
    lora, layer = loaded(tmp_path), Experts()
    LoRAModelManager._convert_3d_to_2d_moe_lora(tables(model="GptOssForCausalLM"), lora, layer, LAYER)
    layer.set_lora(1, lora.get_lora(LAYER).lora_a, lora.get_lora(LAYER).lora_b)
    found = added(model)
    gate_up, down = (found[name].transpose(1, 2) for name in ("gate_up_proj", "down_proj"))
    wanted = {"gate_proj": gate_up[:, ::2], "up_proj": gate_up[:, 1::2], "down_proj": down}
    padded = {name: torch.nn.functional.pad(delta, (0, 8, 0, 8)) for name, delta in wanted.items()}
    print(f"| GPT-OSS, target_parameters, rounded up | what slots hold | {check(layer, padded):.1e} |")

"""DoRA as a GPU's wrapper of kernels computes it: PEFT's answers, for its rows, until its slot is another's.

Here with our kernels for a CPU beneath; with those for a GPU written out in torch (``test_gpu_wrappers``),
and with vLLM's own in Triton's interpreter (``test_interpreted``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.overrides import TorchFunctionMode
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import parallel_state
from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.utils import from_layer
from vllm.model_executor.layers import linear
from vllm.platforms import current_platform

from adapters.inspection.dora import MAGNITUDE
from adapters.worker import dora_gpu, extension, shared_rows_gpu
from adapters.worker.cpu.kernels import GroupedPunicaWrapper
from adapters.worker.dora import Scales
from adapters.worker.dora_gpu import DoraRows, DoraTables, tables_bytes
from adapters.worker.scheduler import DORA
from tests.pure.engine.test_sizing import FUSED
from tests.service.worker.test_shared_slots import ONE_WORKER

HIDDEN, HEAD, HEADS, KV_HEADS, SLOTS, RANK, TOKENS = 32, 8, 4, 2, 4, 16, 24
SIZES = {"q_proj": HEAD * HEADS, "k_proj": HEAD * KV_HEADS, "v_proj": HEAD * KV_HEADS, "o_proj": HIDDEN}
LAYERS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "o_proj": ["o_proj"]}


class DoraRowsOnCPU(DoraRows, GroupedPunicaWrapper):
    """On a CPU, where it proves that answers are the same; there scales belong to our own kernels."""

    def __init__(self, *args: Any, lora_config: Any = None, **given: Any) -> None:
        super().__init__(*args, **given)


class Trained(nn.Module):
    """Linear layers with biases, as PEFT adapts them."""

    def __init__(self) -> None:
        super().__init__()
        for name, size in SIZES.items():
            self.add_module(name, nn.Linear(HIDDEN, size))


def trained(seed: int, **changed: Any) -> Any:
    """PEFT's model around ``Trained``; the layers are always the same."""
    torch.manual_seed(0)
    base = Trained()
    given = {"r": 8, "lora_alpha": 12, "target_modules": list(SIZES), "use_dora": True} | changed
    model = get_peft_model(base, LoraConfig(**given))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
            elif MAGNITUDE.strip(".").split(".")[0] in name:
                weight.mul_(0.5 + torch.rand(weight.shape, generator=generator))
    return model.base_model.model


def scales_of(model: Any) -> Scales:
    """d of each layer, which the upload computes (``adapters.inspection.dora``)."""
    found = {}
    for name in SIZES:
        layer = getattr(model, name)
        if not getattr(layer, "lora_magnitude_vector", None):
            continue
        dora = layer.lora_magnitude_vector["default"]
        delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        norm = dora.get_weight_norm(layer.base_layer.weight, delta, layer.scaling["default"])
        found[f"attn.{name}"] = (dora.weight / norm).detach()
    return found


def layers_of(wrapper: Any, model: Any, dtype: torch.dtype, *, fully: bool = False) -> dict[str, Any]:
    """vLLM's layers with the weights of ``model``, as an engine makes them."""
    with set_current_vllm_config(VllmConfig()):
        lora = LoRAConfig(max_loras=SLOTS, max_lora_rank=RANK, lora_dtype=dtype, fully_sharded_loras=fully)
        inside: dict[str, Any] = {"bias": True, "params_dtype": dtype}
        qkv = linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, **inside)
        out = linear.RowParallelLinear(HIDDEN, HIDDEN, **inside)
        made = {
            "attn.qkv_proj": from_layer(qkv, SLOTS, lora, FUSED["qkv_proj"]),
            "attn.o_proj": from_layer(out, SLOTS, lora, []),
        }
    plain = SimpleNamespace(apply=lambda layer, x, bias: nn.functional.linear(x, layer.weight, bias))
    for name, layer in made.items():
        parts = [getattr(model, part).base_layer for part in LAYERS[name.removeprefix("attn.")]]
        layer.base_layer.weight.data = torch.cat([part.weight.data for part in parts]).to(dtype)
        layer.base_layer.bias.data = torch.cat([part.bias.data for part in parts]).to(dtype)
        layer.base_layer.quant_method = plain
        layer.set_mapping(wrapper)
    return made


def put(layers: dict[str, Any], slot: int, model: Any) -> None:
    """The pairs of an adapter, as vLLM puts them into a slot."""
    for name, layer in layers.items():
        parts = [getattr(model, part) for part in LAYERS[name.removeprefix("attn.")]]
        a = [part.lora_A["default"].weight.detach() for part in parts]
        b = [part.lora_B["default"].weight.detach() * part.scaling["default"] for part in parts]
        layer.set_lora(slot, a if len(a) > 1 else a[0], b if len(b) > 1 else b[0])


def answers(
    layers: dict[str, Any], wrapper: Any, slots: list[int], x: torch.Tensor
) -> dict[str, torch.Tensor]:
    ids = tuple(slot + 1 for slot in slots)
    wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=True), list(range(1, SLOTS + 1)), SLOTS + 1, 100)
    return {name: layer(x)[0] for name, layer in layers.items()}


def differences(wrapper: Any, dtype: torch.dtype) -> list[float]:
    """From PEFT, of two DoRAs, a LoRA and no adapter beside each other; then of a LoRA in a DoRA's slot."""
    models = {0: trained(1), 2: trained(2, use_rslora=True), 3: trained(3, use_dora=False)}
    layers = layers_of(wrapper, models[0], dtype)
    tables = DoraTables(
        SimpleNamespace(
            model=object(),
            modules=layers,
            packed_modules={"attn.qkv_proj": [f"attn.{part}" for part in LAYERS["qkv_proj"]]},
        ),
        None,
    )
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    found = []
    for turn in range(2):
        if turn:  # what was a DoRA's is a LoRA's now
            models[2] = trained(5, use_dora=False)
        for slot, model in models.items():
            put(layers, slot, model)
            tables.fill(slot, scales_of(model))
        slots = [(-1, *models)[i] for i in torch.randint(0, 1 + len(models), (TOKENS,), generator=generator)]
        got = answers(layers, wrapper, slots, x)
        for name, parts in LAYERS.items():
            for row, slot in enumerate(slots):
                of = models.get(slot, models[0])
                made = [getattr(of, part) for part in parts]
                made = made if slot >= 0 else [part.base_layer for part in made]
                with torch.no_grad():
                    want = torch.cat([part(x[row : row + 1].float()) for part in made], 1)[0]
                found.append(float((got[f"attn.{name}"][row].float() - want).abs().max()))
        unscaled = [row for row, slot in enumerate(slots) if slot < 0]
        for name, layer in layers.items():
            base = layer.base_layer
            plain = nn.functional.linear(x, base.weight, base.bias)
            assert torch.equal(got[name][unscaled], plain[unscaled]), (
                "a row without an adapter keeps its bits"
            )
    return found


@contextmanager
def vllms_layers_as_before() -> Iterator[None]:
    """vLLM's layers are again its own afterwards."""
    kept = vars(BaseLinearLayerWithLoRA).copy()
    yield
    for name in ("_apply_lora_to_output", "set_mapping"):
        if name in kept:
            setattr(BaseLinearLayerWithLoRA, name, kept[name])
        elif name in vars(BaseLinearLayerWithLoRA):
            delattr(BaseLinearLayerWithLoRA, name)
    for name in ("loraplex_extra", "loraplex_bias"):
        if hasattr(BaseLinearLayerWithLoRA, name):
            delattr(BaseLinearLayerWithLoRA, name)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(parallel_state, "_TP", ONE_WORKER)
    with vllms_layers_as_before():
        yield


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.15)])
def test_a_dora_answers_as_peft_does(dtype: torch.dtype, tolerance: float) -> None:
    with torch.inference_mode():
        found = differences(DoraRowsOnCPU(TOKENS, TOKENS, "cpu"), dtype)
    assert max(found) < tolerance


def test_only_layers_of_such_an_engine_have_tables() -> None:
    model = trained(1)
    with_tables = layers_of(DoraRowsOnCPU(TOKENS, TOKENS, "cpu"), model, torch.float32)
    others = layers_of(GroupedPunicaWrapper(TOKENS, TOKENS, "cpu"), model, torch.float32)
    assert [tables_bytes(layer) for layer in with_tables.values()] == [4 * 64, 4 * HIDDEN]
    assert not any(tables_bytes(layer) for layer in others.values())
    assert dora_gpu.serves(SimpleNamespace(modules=with_tables))
    assert not dora_gpu.serves(SimpleNamespace(modules=others))


def test_a_scale_that_fits_no_layer_is_not_passed_over() -> None:
    layers = layers_of(DoraRowsOnCPU(TOKENS, TOKENS, "cpu"), trained(1), torch.float32)
    tables = DoraTables(SimpleNamespace(model=object(), modules=layers, packed_modules={}), None)
    with pytest.raises(ValueError, match="fit no layer"):
        tables.fill(0, {"attn.other": torch.ones(HIDDEN)})
    with pytest.raises(ValueError, match="has 9 numbers"):
        tables.fill(0, {"attn.o_proj": torch.ones(9)})
    assert not layers["attn.o_proj"].loraplex_extra.any()


def test_layers_that_add_adapters_by_calls_of_their_own_have_no_tables() -> None:
    """As those of ``fully_sharded_loras``: a DoRA there would be served as the LoRA beneath it."""
    layers = layers_of(DoraRowsOnCPU(TOKENS, TOKENS, "cpu"), trained(1), torch.float32, fully=True)
    assert {type(layer).__name__ for layer in layers.values()} == {
        "MergedQKVParallelLinearWithShardedLoRA",
        "RowParallelLinearWithShardedLoRA",
    }
    tables = SimpleNamespace(model=object(), modules=layers, packed_modules={})
    assert not dora_gpu.serves(tables)
    with pytest.raises(ValueError, match="fit no layer"):
        DoraTables(tables, None).fill(0, {"attn.o_proj": torch.ones(HIDDEN)})


def test_a_worker_of_a_base_that_is_quantized_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no config.json in a folder says so, as for a model of the hub."""
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(current_platform, "is_cuda_alike", lambda: True)
    layers = layers_of(DoraRowsOnCPU(TOKENS, TOKENS, "cpu"), trained(1), torch.float32)
    manager = SimpleNamespace(_adapter_manager=SimpleNamespace(modules=layers, lora_slots=SLOTS))
    with pytest.raises(ValueError, match=r"DORA_ON_GPU: .* not quantized, .* \(fp8\)"):
        extension._Pager(manager, 1, 1, SimpleNamespace(model="org/model", quantization="fp8"))


class Crossings(TorchFunctionMode):
    """What is copied to another device by ``to``, and which memory was asked to be pinned; none is."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[torch.Tensor] = []
        self.crossed: list[tuple[int, bool]] = []  # where from, and whether nobody waits
        self.widened = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        pinned = func is torch.empty and kwargs.pop("pin_memory", False)
        made = func(*args, **kwargs)
        if pinned:
            self.pinned.append(made)
        self.widened += func is torch.Tensor.float
        if func is torch.Tensor.copy_:
            assert args[0].device == args[1].device, "on the device, each to its place"
        if func is torch.Tensor.to and made.device != args[0].device:
            self.crossed.append((args[0].data_ptr(), kwargs.get("non_blocking", False)))
        return made


def test_a_slot_is_filled_without_waiting_for_the_steps_in_flight() -> None:
    """A copy from memory that is not pinned would end behind the step that the engine runs."""
    layers = layers_of(DoraRowsOnCPU(TOKENS, TOKENS, "cpu"), trained(1), torch.float32)
    for layer in layers.values():
        layer.loraplex_extra = layer.loraplex_extra.to("meta")
    tables = SimpleNamespace(
        model=object(),
        modules=layers,
        packed_modules={"attn.qkv_proj": [f"attn.{part}" for part in LAYERS["qkv_proj"]]},
    )
    of_adapters = [scales_of(trained(1)), scales_of(trained(2, target_modules=["q_proj", "o_proj"]))]
    with Crossings() as seen:
        dora = DoraTables(tables, None)
        for scales in of_adapters:
            dora.fill(1, scales)
    assert len(seen.pinned) == 3, "the first is made before any step"
    from_pinned = [(room.data_ptr(), True) for room in seen.pinned[1:]]
    assert seen.crossed == from_pinned, "one for each slot that is filled"
    assert not seen.widened, "biases were widened when the layers were made"


def test_it_is_compiled_in_one_piece_for_any_number_of_rows() -> None:
    """A break in the middle of a layer would end vLLM's graph there."""
    wrapper = DoraRowsOnCPU(TOKENS, TOKENS, "cpu")
    layer = layers_of(wrapper, trained(1), torch.float32)["attn.o_proj"]
    layer.loraplex_extra[1] = 0.5
    wrapper._token_lora_indices.fill_(1)
    wrapper.add_lora_linear = lambda y, x, a, b, scale, slices: y.add_(x, alpha=scale)
    compiled = torch.compile(layer._apply_lora_to_output, backend="eager", fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for rows in (3, 7):
            x, y = torch.randn(rows, HIDDEN), torch.randn(rows, HIDDEN)
            want = (y + x) + 0.5 * (y + x - layer.base_layer.bias)
            assert torch.allclose(compiled(x, y.clone()), want, atol=1e-6)


def test_the_platform_names_the_wrapper_of_an_engine_that_serves_dora(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(current_platform, "get_punica_wrapper", lambda: "vllm's own", raising=False)
    monkeypatch.setattr(current_platform, "is_cuda_alike", lambda: True, raising=False)
    shared_rows_gpu.offer()
    for given, name in (({DORA: 1}, "adapters.worker.dora_gpu.DoraRowsOnGPU"), ({}, "vllm's own")):
        with set_current_vllm_config(VllmConfig(additional_config=given)):
            assert current_platform.get_punica_wrapper() == name

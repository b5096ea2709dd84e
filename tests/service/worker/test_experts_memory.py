"""Experts in host memory that is made once: whole adapters, none of whose tensors is pinned by itself."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.lora import lora_model, model_manager
from vllm.lora.model_manager import LoRAModelManager

from adapters.worker import extension, shards
from adapters.worker.extension import read_with
from adapters.worker.host_memory import Loader
from adapters.worker.host_pool import HostPool
from tests.service.worker.test_experts import (
    EXPERTS,
    LAYER,
    RealExperts,
    apart,
    loaded,
    trained_by,
    unstacked,
)

ATTENTION = ("q_proj", "k_proj", "v_proj")
FUSED = "model.layers.0.self_attn.qkv_proj"
FORMS = ["together", "apart"]


class OneWorkersExperts(RealExperts):
    local_num_experts, ep_rank, use_ep = EXPERTS, 0, False


class Tables(LoRAModelManager):  # type: ignore[misc]  # vLLM is not typed for us
    """As much of vLLM's as merges what was read."""

    def __init__(self) -> None:
        self.packed_modules = {LAYER: apart(), FUSED: [FUSED.replace("qkv_proj", name) for name in ATTENTION]}
        self.modules = {LAYER: OneWorkersExperts(), FUSED: object()}
        self.model = torch.nn.Module()
        self.model.config = SimpleNamespace(architectures=["Qwen3MoeForCausalLM"])
        self._is_moe = self._enable_mixed_moe_lora_format = True
        self._enable_moe_shared_loras = self._is_non_gated_moe = self.is_pooling_model = False


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each tensor that is pinned by itself, as on a machine with a GPU."""
    calls: list[int] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    for module in (lora_model, model_manager):
        monkeypatch.setattr(module, "PIN_MEMORY", True)
    monkeypatch.setattr(lora_model, "safetensors", lora_model.safetensors)
    return calls


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter on attention and experts, in both forms."""
    root = tmp_path_factory.mktemp("experts")
    together = root / "together"
    trained_by("Qwen3-MoE, the list of seven", together, rank_pattern={}, alpha_pattern={})
    return {"together": together, "apart": unstacked(together, root / "apart")}


def merged(tables: Any, folder: Path, form: str) -> Any:
    lora = loaded(folder)
    lora.is_3d_lora_weight = form == "together"
    tables._create_merged_loras_inplace(lora)
    return lora


def tensors(lora: Any) -> list[torch.Tensor]:
    sides = [side for _, one in sorted(lora.loras.items()) for side in (one.lora_a, one.lora_b)]
    return [t for side in sides for t in (side if isinstance(side, list) else [side]) if t is not None]


@pytest.mark.parametrize("form", FORMS)
def test_they_lie_in_the_piece_and_are_pinned_with_it(
    form: str, folders: dict[str, Path], pinned: list[int]
) -> None:
    usual = merged(Tables(), folders[form], form)
    assert pinned, "by vLLM alone each is pinned by itself"
    pinned.clear()
    pool = HostPool(4 << 20, 1 << 20, 2, pin=lambda address, size: None)
    tables = Tables()
    assert shards.is_merged(tables)
    shards.cut_when_read(tables, lambda elements: pool.tensor(elements, torch.float32))
    shards.pin_nothing()
    read_with(Loader(pool, torch.float32))
    lora = merged(tables, folders[form], form)
    assert not pinned
    wanted = {name: one for name, one in usual.loras.items() if name in tables.modules}
    assert lora.loras.keys() == wanted.keys() == {LAYER, FUSED}
    for got, want in zip(
        tensors(lora), [t for _, one in sorted(wanted.items()) for t in of(one)], strict=True
    ):
        assert torch.equal(got, want)
        assert pool.holds(got)
    gc.collect()
    pool.settle(lambda: Ended())
    assert pool.account()["free"] == pool.size - (1 << 20), "what was read is free, the adapter is not"
    assert pool.misses == 0


@pytest.mark.parametrize("pooled", [True, False])
def test_they_stay_where_vllm_pins_them_if_no_memory_was_pinned(
    pooled: bool, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots are filled by copies that nobody waits for, which want memory that is pinned."""
    places: dict[int, torch.Tensor] = {}

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        made = tensor.clone()
        return places.setdefault(made.data_ptr(), made)

    def refuse(address: int, size: int) -> None:
        raise RuntimeError("the driver refuses")

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(extension, "pin_for_cuda", refuse)
    monkeypatch.setattr(extension, "PREFAULTED_BYTES", 1 << 20)
    monkeypatch.setattr(extension, "allocated", lambda model: 1 << 20)
    for module in (lora_model, model_manager):
        monkeypatch.setattr(module, "PIN_MEMORY", True)
    monkeypatch.setattr(lora_model, "safetensors", lora_model.safetensors)
    pager = object.__new__(extension._Pager)
    pager.manager = SimpleNamespace(lora_config=SimpleNamespace(lora_dtype=torch.float32))
    pager.tables, pager.host_slots, pager._slots = Tables(), 1, 1
    pager._on_cpu, pager._on_cuda, pager._cuts = False, True, False
    assert not pager._make_room(pooled, 1).pinned
    lora = merged(pager.tables, folders["apart"], "apart")
    assert all(tensor.data_ptr() in places for tensor in tensors(lora))


def of(one: Any) -> list[torch.Tensor]:
    sides = [side if isinstance(side, list) else [side] for side in (one.lora_a, one.lora_b)]
    return [t for side in sides for t in side if t is not None]


class Ended:
    def query(self) -> bool:
        return True


def test_one_that_does_not_fit_in_is_pinned_as_a_whole(folders: dict[str, Path], pinned: list[int]) -> None:
    pool = HostPool(1 << 20, 1 << 20, 2, pin=lambda address, size: None)
    full = pool.lend(1 << 20)
    tables = Tables()
    shards.cut_when_read(tables, lambda elements: pool.tensor(elements, torch.float32))
    shards.pin_nothing()
    lora = merged(tables, folders["apart"], "apart")
    assert pinned == [sum(t.nbytes for t in tensors(lora))]
    assert pool.misses == 1
    assert len(full) == 1 << 20

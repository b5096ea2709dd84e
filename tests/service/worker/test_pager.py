"""A worker's paging with vLLM's own tables in this process: what it answers, and what it keeps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from adapters.worker.cpu import onednn, ranks
from adapters.worker.extension import _Pager
from tests.support.trainer import make_base
from tests.support.vllm_models import SLOTS, loaded, read

HOST = SLOTS


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pager")
    base = make_base("llama", root / "base")
    for rank in (4, 8, 64):
        config = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(base.fresh(), config).save_pretrained(root / f"rank-{rank}")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def tables(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from vllm.lora import lora_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_model, "safetensors", lora_model.safetensors)  # which a pager replaces
        with loaded(folders["base"], "float32", tmp_path_factory.mktemp("room"), rank=64) as made:
            yield made


def pager(tables: Any, folders: dict[str, Path], **options: Any) -> _Pager:
    manager = SimpleNamespace(
        _adapter_manager=tables,
        lora_config=tables.lora_config,
        _load_adapter=lambda asked: read(tables, Path(asked.lora_path), asked.lora_int_id),
    )
    model = SimpleNamespace(model=str(folders["base"]), quantization=None)
    return _Pager(manager, SLOTS, HOST, model, **options)


def stage(paging: _Pager, *loads: tuple[int, Path]) -> None:
    ended = paging.page([("stage", load, f"t/a@{load}", str(path)) for load, path in loads])["staged"]
    deadline = time.monotonic() + 120
    while len(ended) < len(loads):
        assert time.monotonic() < deadline
        time.sleep(0.01)
        ended += paging.page([])["staged"]
    assert [error for _, error, *_ in ended] == [None] * len(loads)


def fill(paging: _Pager, *loads: int) -> int:
    """How many calls it took."""
    answer = paging.page([("activate", load, "", "") for load in loads])
    assert [error for error, _ in answer["results"]] == [None] * len(loads)
    calls, ended = 1, list(answer["activated"])
    while answer["filling"]:
        answer = paging.page([])
        ended += answer["activated"]
        calls += 1
    assert [error for _, error, _ in ended] == [None] * len(ended)
    assert [load for load in paging.report()["slots"] if load is not None] == list(loads)
    return calls


def slots(tables: Any) -> list[Any]:
    """What the kernels multiply by, of every layer and slot."""
    (wrapper,) = {id(one): one for one in tables.punica_wrapper_mapping.values()}.values()
    return [
        weights
        for layer in wrapper._parts.values()
        for parts in layer
        for part in parts
        for weights in part or ()
    ]


@pytest.mark.parametrize("pool", [True, False])
def test_slices_put_into_slots_what_one_call_does(tables: Any, folders: dict[str, Path], pool: bool) -> None:
    found = []
    for slice_s, most in ((1e-9, 1000), (0.0, 1)):
        paging = pager(tables, folders, pool=pool, slice_s=slice_s)
        stage(paging, (1, folders["rank-8"]), (2, folders["rank-64"]))
        assert 1 <= fill(paging, 1, 2) <= most
        found.append([weights.clone() for weights in slots(tables)])
        paging.page([("evict", 1, "", ""), ("evict", 2, "", "")])
        paging.close()
    sliced, whole = found
    assert len(sliced) == len(whole) > 20
    assert all(torch.equal(*pair) for pair in zip(sliced, whole, strict=True))


def test_no_dora_is_served_where_layers_add_adapters_by_calls_of_their_own(
    tables: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with ``fully_sharded_loras``, whose outputs nobody scales: the LoRA beneath it would answer."""
    found = []
    for fully in (False, True):
        monkeypatch.setattr(tables.lora_config, "fully_sharded_loras", fully)
        paging = pager(tables, folders)
        found.append(paging.describe()["dora"])
        paging.close()
    assert found == [True, False]


def test_what_has_left_leaves_its_memory(tables: Any, folders: dict[str, Path]) -> None:
    """Also that of a slot, which kernels on a CPU read where it lies."""
    paging = pager(tables, folders)
    whole = paging.report()["pool"]
    assert whole["free"] == whole["bytes"] > 0
    for number in range(10, 40, 2):
        loads, ranks = (number, number + 1), ((8, 64), (64, 4))[number % 4 // 2]
        stage(paging, *zip(loads, (folders[f"rank-{rank}"] for rank in ranks), strict=True))
        assert paging.report()["pool"]["free"] < whole["bytes"]
        fill(paging, *loads)
        paging.page([("deactivate", loads[0], "", ""), *[("evict", load, "", "") for load in loads]])
    assert paging.report()["pool"] == whole, "none lost, and none that did not fit"
    paging.close()


def test_log_probabilities_are_counted_without_a_compiler(
    tables: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.sample import sampler

    monkeypatch.setattr(sampler, "batched_count_greater_than", sampler.batched_count_greater_than)
    monkeypatch.setenv(onednn.CAPACITY, "0")
    pager(tables, folders).make_kernels(SimpleNamespace(max_num_batched_tokens=1, max_num_seqs=1))
    assert sampler.batched_count_greater_than is ranks.count_as_great

"""How weights get into host memory: every element once, in memory that is used again, and nothing is lost."""

from __future__ import annotations

import gc
import json
import mmap
import os
import random
import struct
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from adapters.worker import host_memory
from adapters.worker.extension import read_with
from adapters.worker.host_memory import BufferPool, Loader, Weights, take_short_turns
from tests.support import tiny

MIB = 1 << 20
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def pool() -> BufferPool:
    return BufferPool(MIB, keep=2)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / WEIGHTS_FILE


def contents(weights: Weights) -> dict[str, torch.Tensor]:
    with weights as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def some_tensors(chance: random.Random, dtypes: tuple[torch.dtype, ...]) -> dict[str, torch.Tensor]:
    torch.manual_seed(chance.randrange(1 << 30))
    shapes = [[chance.choice((0, 1, 2, 3, 7, 64)) for _ in range(chance.choice((1, 2)))] for _ in range(9)]
    return {f"t{i}": torch.randn(shape).to(chance.choice(dtypes)) for i, shape in enumerate(shapes)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(12))
def test_every_tensor_is_what_was_saved(file: Path, pool: BufferPool, seed: int, dtype: torch.dtype) -> None:
    chance = random.Random(seed)
    saved = some_tensors(chance, chance.choice((DTYPES, (torch.float32,), (torch.bfloat16,))))
    save_file(saved, file)
    for _ in range(2):  # the second time in memory that is no longer zero
        read = contents(Loader(pool, dtype).open(str(file)))
        assert read.keys() == saved.keys()
        for name, tensor in saved.items():
            assert torch.equal(read[name], tensor.to(dtype))
            assert read[name].shape == tensor.shape
        del read


def test_memory_is_lent_again_once_no_tensor_is_in_it(file: Path, pool: BufferPool) -> None:
    save_file({"a": torch.ones(MIB), "b": torch.ones(MIB)}, file)
    loader = Loader(pool, torch.float32)
    first = contents(loader.open(str(file)))
    place = first["a"].data_ptr()
    assert first["b"].data_ptr() == place + 4 * MIB
    second = contents(loader.open(str(file)))
    assert second["a"].data_ptr() != place
    left = first.pop("b")
    del first
    assert repr(pool) == "BufferPool(free [] MiB)"
    assert torch.equal(left, torch.ones(MIB))
    del left
    assert repr(pool) == "BufferPool(free [8] MiB)"
    assert contents(loader.open(str(file)))["a"].data_ptr() == place


def test_one_may_end_in_the_middle_of_anothers_beginning() -> None:
    """As where the collector runs just then, and its region crowds out the one that was to be lent."""

    class Region(mmap.mmap):
        def __len__(self) -> int:
            held.clear()
            return super().__len__()

    pool = BufferPool(MIB, keep=1)
    held = [pool.lend(2 * MIB)]
    pool._free = [Region(-1, MIB)]
    lent = pool.lend(MIB)
    assert (len(lent), held) == (MIB, [])
    assert len(pool.lend(MIB)) == 2 * MIB, "what ended then is lent next"


def test_the_largest_few_regions_are_kept_and_the_smallest_that_fits_is_lent(pool: BufferPool) -> None:
    buffers = [pool.lend(size * MIB) for size in (3, 9, 5, 7)]
    buffers.clear()
    assert repr(pool) == "BufferPool(free [7, 9] MiB)"
    buffer = pool.lend(4 * MIB + 1)
    assert len(buffer) == 7 * MIB
    assert repr(pool) == "BufferPool(free [9] MiB)"
    assert len(pool.lend(10 * MIB)) == 10 * MIB


def test_buffers_are_as_large_as_any_adapter_so_that_each_fits_the_next(pool: BufferPool) -> None:
    pool = BufferPool(5 * MIB, keep=3)
    buffers = [pool.lend(size) for size in (1, 2 * MIB, 5 * MIB)]
    buffers.clear()
    assert repr(pool) == "BufferPool(free [5, 5, 5] MiB)"
    buffers = [pool.lend(5 * MIB) for _ in range(3)]
    assert repr(pool) == "BufferPool(free [] MiB)"


def test_buffers_are_written_to_in_advance() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    pool = BufferPool(20 * MIB, keep=8)
    pool.prefault(70 * MIB)
    assert repr(pool) == "BufferPool(free [20, 20, 20] MiB)"
    assert process.memory_info().rss - before > 50 * MIB


def test_no_more_is_written_to_than_is_kept() -> None:
    pool = BufferPool(MIB, keep=2)
    pool.prefault(70 * MIB)
    assert repr(pool) == "BufferPool(free [1, 1] MiB)"


def test_buffers_may_end_on_any_thread(pool: BufferPool) -> None:
    """Also where the collector ends one in the middle of another's beginning or end."""
    wrong: list[int] = []

    def borrow(number: int) -> None:
        chance = random.Random(number)
        mine: list[Any] = []
        for _ in range(300):
            buffer = pool.lend(chance.randint(1, 3) * MIB)
            buffer[:8] = struct.pack("q", id(buffer))
            cycle: list[Any] = [buffer]
            cycle.append(cycle)
            mine.append(cycle)
            if chance.random() < 0.5:
                held = mine.pop(chance.randrange(len(mine)))
                if struct.unpack("q", held[0][:8])[0] != id(held[0]):
                    wrong.append(number)
            if len(mine) > 4:
                mine.clear()

    threads = [threading.Thread(target=borrow, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not wrong
    assert len(pool._free) == 2


def test_hundreds_of_loads_leave_no_memory_behind(file: Path, pool: BufferPool) -> None:
    """safetensors' ``get_tensor`` loses 64 bytes each time, 12 MiB here."""
    save_file({f"layer.{i}.lora_A.weight": torch.ones(4, 8) for i in range(400)}, file)
    loader = Loader(pool, torch.float32)
    process = psutil.Process()
    for number in range(600):
        contents(loader.open(str(file)))
        if number == 99:
            gc.collect()
            settled = process.memory_info().rss
    gc.collect()
    assert process.memory_info().rss - settled < 4 * MIB


def damaged(file: Path, damage: str) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    if damage == "short":
        data = data[:-4]
    elif damage == "long":
        data += bytes(4)
    elif damage == "shape":
        header["a"]["shape"] = [3]
    elif damage == "gap":
        header["b"]["data_offsets"] = [n + 4 for n in header["b"]["data_offsets"]]
    elif damage == "dtype":
        header["a"]["dtype"] = "I8"
    encoded = json.dumps(header).encode()
    prefix = 1 << 60 if damage == "header" else len(encoded)
    file.write_bytes(b"" if damage == "empty" else struct.pack("<Q", prefix) + encoded + data)


@pytest.mark.parametrize("damage", ["short", "long", "shape", "gap", "dtype", "header", "empty"])
def test_a_file_that_is_damaged_is_not_read(file: Path, pool: BufferPool, damage: str) -> None:
    save_file({"a": torch.arange(4.0), "b": torch.arange(5.0)}, file)
    damaged(file, damage)
    with pytest.raises((ValueError, KeyError)):
        Loader(pool, torch.float32).open(str(file))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_is_cut_short_meanwhile_fails_alone(
    file: Path, pool: BufferPool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped one would end the process with SIGBUS."""
    save_file({"a": torch.ones(1000)}, file)
    fill = host_memory._fill

    def cut(*args: Any) -> None:
        os.truncate(file, 3000)
        fill(*args)

    monkeypatch.setattr(host_memory, "_fill", cut)
    with pytest.raises(ValueError, match="cut short"):
        Loader(pool, dtype).open(str(file))
    gc.collect()
    assert "free [1" in repr(pool), "nothing refers to what was read"


def test_vllms_own_loader_reads_through_it(pool: BufferPool, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora import lora_model
    from vllm.lora.peft_helper import PEFTHelper

    monkeypatch.setattr(lora_model, "safetensors", lora_model.safetensors)  # undone after the test
    read_with(Loader(pool, torch.float32))
    folder = tiny.adapter(1)
    modules = set(json.loads((folder / CONFIG_FILE).read_text())["target_modules"])
    helper = PEFTHelper.from_local_dir(str(folder), None)
    lora = lora_model.LoRAModel.from_local_checkpoint(
        str(folder), modules, helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )
    sides = [side for layer in lora.loras.values() for side in (layer.lora_a, layer.lora_b)]
    assert len({side.untyped_storage().data_ptr() for side in sides}) == 1


@pytest.mark.parametrize(("before", "after"), [(0.005, 0.0005), (0.0001, 0.0001)])
def test_a_load_gives_the_lock_away_in_time(before: float, after: float) -> None:
    usual = sys.getswitchinterval()
    try:
        sys.setswitchinterval(before)
        take_short_turns()
        assert sys.getswitchinterval() == pytest.approx(after, rel=0.05)
    finally:
        sys.setswitchinterval(usual)

"""Memory made once: no range is lent twice, none is lost, and none is lent while a copy may still read it."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapters.model import WEIGHTS_FILE
from adapters.worker.host_memory import Loader
from adapters.worker.host_pool import Arena, HostPool, pin_for_cuda

MIB = 1 << 20


class Gate:
    """A fence that a test opens."""

    def __init__(self) -> None:
        self.open = False

    def query(self) -> bool:
        return self.open


class Driver:
    """What pins: once, or not at all."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.pinned: list[tuple[int, int]] = []

    def __call__(self, address: int, size: int) -> None:
        if self.error is not None:
            raise self.error
        self.pinned.append((address, size))


def place(buffer: Any) -> int:
    return torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()


@pytest.mark.parametrize("seed", range(20))
def test_ranges_never_overlap_and_all_come_back(seed: int) -> None:
    rng = random.Random(seed)
    arena = Arena(rng.choice([64, 100, 1000]))
    taken: dict[int, int] = {}
    for _ in range(400):
        if taken and rng.random() < 0.5:
            at = rng.choice(list(taken))
            arena.give_back(at)
            del taken[at]
            continue
        size = rng.randint(1, 40)
        at_ = arena.take(size)
        ends = sorted((at, at + length) for at, length in taken.items())
        if at_ is None:
            edges = [0, *(edge for pair in ends for edge in pair), arena.size]
            assert all(b - a < size for a, b in zip(edges[::2], edges[1::2], strict=True)), "there was room"
            continue
        assert 0 <= at_ <= arena.size - size
        assert all(at_ + size <= first or last <= at_ for first, last in ends)
        taken[at_] = size
        assert arena.free == arena.size - sum(taken.values())
    for at in taken:
        arena.give_back(at)
    assert repr(arena) == f"Arena({arena.size} bytes, free [(0, {arena.size})])"


def test_a_range_is_given_back_once() -> None:
    arena = Arena(10)
    assert arena.take(4) == 0
    arena.give_back(0)
    with pytest.raises(KeyError):
        arena.give_back(0)
    assert arena.take(11) is None
    assert Arena(0).take(1) is None


def test_the_piece_is_pinned_once_and_adapters_lie_in_it() -> None:
    driver = Driver()
    pool = HostPool(8 * MIB, entry=4 * MIB, keep=2, pin=driver)
    ((address, size),) = driver.pinned
    assert (size, pool.pinned) == (8 * MIB, True)
    buffers = [pool.lend(3 * MIB) for _ in range(2)]
    assert [place(buffer) - address for buffer in buffers] == [0, 3 * MIB]
    beside = pool.lend(3 * MIB)
    assert not address <= place(beside) < address + size, "what does not fit is lent beside it"
    assert len(driver.pinned) == 1
    assert pool.account() == {"bytes": 8 * MIB, "free": 2 * MIB, "pinned": 1, "misses": 1}


class Result:
    """As C's enumerations are in Python: equal to no number, and convertible to one."""

    def __init__(self, code: int) -> None:
        self.code = code

    def __int__(self) -> int:
        return self.code


@pytest.mark.parametrize("code", [0, 2])
def test_what_the_driver_says_of_pinning_is_heard(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []

    class Runtime:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> Result:
            asked.append((address, size, flags))
            return Result(code)

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    pool = HostPool(2 * MIB, entry=MIB, keep=2, pin=pin_for_cuda)
    ((address, size, _),) = asked
    assert (address > 0, size) == (True, 2 * MIB)
    assert pool.pinned == (code == 0)
    assert pool.size == (2 * MIB if code == 0 else 0)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), OSError("no driver")])
def test_where_it_cannot_be_pinned_there_is_none(error: Exception) -> None:
    pool = HostPool(8 * MIB, entry=4 * MIB, keep=2, pin=Driver(error))
    assert pool.account() == {"bytes": 0, "free": 0, "pinned": 0, "misses": 0}
    assert len(pool.lend(MIB)) == 4 * MIB, "as without a pool"


def test_nothing_is_lent_again_before_the_last_copy_out_of_it_has_ended() -> None:
    pool = HostPool(4 * MIB, entry=4 * MIB, keep=2, pin=Driver())
    gates: list[Gate] = []

    def fence() -> Gate:
        gates.append(Gate())
        return gates[-1]

    buffer = pool.lend(4 * MIB)
    first = place(buffer)
    pool.settle(fence)
    assert not gates, "nothing was left"
    del buffer
    beside = pool.lend(4 * MIB)
    assert place(beside) != first, "no fence is behind it yet"
    pool.settle(fence)
    another = pool.lend(4 * MIB)
    assert place(another) != first, "copies go on"
    gates[0].open = True
    again = pool.lend(4 * MIB)
    assert place(again) == first
    assert pool.misses == 2


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("pinned", [False, True])
def test_adapters_that_come_and_go_keep_their_bytes(
    seed: int, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the collector ends one in the middle of another's beginning."""
    # What does not fit in is pinned by the driver, which gives memory of its own.
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    rng = random.Random(seed)
    pool = HostPool(12 * MIB, entry=2 * MIB, keep=2, pin=Driver() if pinned else None)
    held: list[tuple[int, list[Any]]] = []
    gates: list[Gate] = []

    def fence() -> Gate:
        gates.append(Gate())
        return gates[-1]

    for number in range(150):
        tensor = pool.tensor(rng.randint(1, 3 * MIB // 8), torch.int64)
        tensor[0] = tensor[-1] = number
        cycle: list[Any] = [tensor]
        if rng.random() < 0.3:
            cycle.append(cycle)
        held.append((number, cycle))
        while len(held) > 5 or (held and rng.random() < 0.4):
            mark, gone = held.pop(rng.randrange(len(held)))
            assert gone[0][0] == gone[0][-1] == mark
        if rng.random() < 0.5:
            pool.settle(fence)
        for gate in gates:
            gate.open = gate.open or rng.random() < 0.5
    assert all(kept[0][0] == kept[0][-1] == mark for mark, kept in held)
    held.clear()
    gone = cycle = tensor = None  # type: ignore[assignment]
    gc.collect()
    pool.settle(fence)
    for gate in gates:
        gate.open = True
    account = pool.account()
    assert account["free"] == account["bytes"] == 12 * MIB, "none is lost"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_load_that_fails_leaves_its_room(tmp_path: Path, dtype: torch.dtype) -> None:
    pool = HostPool(8 * MIB, entry=2 * MIB, keep=2)
    pool.touch()
    file = tmp_path / WEIGHTS_FILE
    saved = {"a": torch.randn(300, 7), "b": torch.randn(5, 300)}
    save_file(saved, file)
    with Loader(pool, dtype).open(str(file)) as weights:
        for name, tensor in saved.items():
            assert torch.equal(weights.get_tensor(name), tensor.to(dtype))
        assert pool.account()["free"] == 7 * MIB
    del weights
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="damaged"):
        Loader(pool, dtype).open(str(file))
    gc.collect()
    assert pool.account()["free"] == 8 * MIB

"""Whatever bytes an adapter's files have: they are read, or refused in bounded time."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from adapters.errors import CURES, AdapterRejected
from adapters.inspection import strict_json
from adapters.inspection.inspect import inspect
from adapters.inspection.peft_config import read_config
from adapters.inspection.safetensors_header import MAX_HEADER_BYTES, read_header
from adapters.model import CONFIG_FILE, WEIGHTS_FILE, BaseModel
from tests.support.peft_adapters import K1, base, good

__all__ = ["base", "good"]

FUZZ = settings(
    max_examples=int(os.environ.get("LORAPLEX_FUZZ_EXAMPLES", "300")),
    deadline=10_000,
    derandomize="LORAPLEX_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["q_proj", K1, "LORA", "none", "gaussian"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def edits(draw: st.DrawFn, length: int = 4096) -> list[tuple[int, int, bytes]]:
    """Cuts and insertions: (position, bytes removed, bytes put there)."""
    at = st.integers(0, length)
    return draw(
        st.lists(st.tuples(at, st.integers(0, 40) | at, st.binary(max_size=24)), min_size=1, max_size=4)
    )


def edited(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for at, removed, put in changes:
        data = data[:at] + put + data[at + removed :]
    return data


def only_rejected(call: Callable[[], Any]) -> None:
    refused: AdapterRejected | None = None
    try:
        call()
    except AdapterRejected as error:
        refused = error
    if refused is not None:
        assert refused.message.endswith(CURES[refused.code])
        refused.message.encode()


@FUZZ
@given(data=st.binary(max_size=400) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_config_is_read_or_refused(data: bytes, base: BaseModel, tmp_path: Path) -> None:
    path = tmp_path / CONFIG_FILE
    path.write_bytes(data)
    only_rejected(lambda: read_config(path, base))


@FUZZ
@given(changes=edits(1200))
def test_any_damage_to_a_config_is_read_or_refused(
    changes: list[tuple[int, int, bytes]], good: Path, base: BaseModel, tmp_path: Path
) -> None:
    path = tmp_path / CONFIG_FILE
    path.write_bytes(edited((good / CONFIG_FILE).read_bytes(), changes))
    only_rejected(lambda: read_config(path, base))


@FUZZ
@given(
    data=st.binary(max_size=300)
    | st.dictionaries(st.text(max_size=12), json_values, max_size=3).map(
        lambda value: (raw := json.dumps(value).encode()) and struct.pack("<Q", len(raw)) + raw
    )
)
def test_any_weights_are_read_or_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(data)
    only_rejected(lambda: read_header(path))


@FUZZ
@given(changes=edits(1600), fix_length=st.booleans())
def test_any_damage_to_weights_is_read_as_safetensors_reads_it(
    changes: list[tuple[int, int, bytes]], fix_length: bool, good: Path, base: BaseModel, tmp_path: Path
) -> None:
    shutil.copy(good / CONFIG_FILE, tmp_path)
    path = tmp_path / WEIGHTS_FILE
    data = (good / WEIGHTS_FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    if fix_length:
        raw = edited(data[8 : 8 + length], changes)
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])
    else:
        path.write_bytes(edited(data, changes))
    only_rejected(lambda: inspect(tmp_path, base, serving_dtype="float16"))
    try:
        header = read_header(path)
    except AdapterRejected:
        return
    assert {name: tensor.shape for name, tensor in header.items()} == {
        name: tuple(tensor.shape) for name, tensor in load_file(path).items()
    }


HOSTILE_HEADERS: dict[str, Callable[[int], bytes]] = {
    "lists": lambda size: b'{"a":' + b"[" * (size - 5),
    "objects": lambda size: b'{"a":[' + b"{}," * (size // 3 - 4) + b"{}]}",
    "integers": lambda size: b'{"a":[' + b"1," * (size // 2 - 5) + b"1]}",
    "strings": lambda size: b'{"a":[' + b'"",' * (size // 3 - 5) + b'""]}',
    "digits": lambda size: b'{"a":' + b"9" * (size - 6) + b"}",
    "blanks": lambda size: b"{" + b" " * (size - 2) + b"}",
    "one name": lambda size: b'{"' + b"x" * (size - 6) + b'":1}',
}


@pytest.mark.parametrize("name", HOSTILE_HEADERS)
def test_the_largest_header_is_refused_in_bounded_time(name: str, tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_FILE
    raw = HOSTILE_HEADERS[name](MAX_HEADER_BYTES)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    started = time.process_time()
    with pytest.raises(AdapterRejected) as caught:
        read_header(path)
    assert time.process_time() - started < 5
    assert caught.value.code == "weights_invalid"
    assert len(caught.value.message) < 600


@pytest.mark.parametrize("value", ["x" * 10_000, {"a": ["\ud800\0"] * 99}, 10**4000])
def test_show_is_short_and_printable(value: object) -> None:
    assert len(strict_json.show(value)) <= 120
    assert strict_json.show(value).isprintable()
    strict_json.show(value).encode()

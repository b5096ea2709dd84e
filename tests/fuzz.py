"""Mutated configs and headers against their parsers: ``python -m tests.fuzz --count 200000`` (``make fuzz``).

Whatever the bytes, the answer is a value or an AdapterRejected with a message that can be sent; it comes
within ``SLOWEST`` of processor time, and memory does not grow. Every input follows from seed and number.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from adapters.errors import CURES, AdapterRejected
from adapters.inspection.convert import plan
from adapters.inspection.peft_config import read_config
from adapters.inspection.safetensors_header import read_header
from adapters.model import CONFIG_FILE, WEIGHTS_FILE, BaseModel, ModuleShape

SLOWEST = 0.1  # seconds
MOST_GROWTH = 64 << 20  # bytes of memory over a whole run
LONGEST = 600  # characters of a message

MODULES = {
    f"model.layers.{layer}.self_attn.{name}": ModuleShape(8, out)
    for layer in range(2)
    for name, out in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4))
}
BASE = BaseModel(
    "tiny-llama",
    MODULES,
    max_lora_rank=16,
    fused={"qkv_proj": ("q_proj", "k_proj", "v_proj")},
    fingerprint="f" * 64,
)
CONFIG: dict[str, Any] = {
    "alpha_pattern": {"layers.1.self_attn.q_proj": 4},
    "base_model_name_or_path": "acme/tiny-llama",
    "bias": "none",
    "exclude_modules": None,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": [0, 1],
    "lora_alpha": 8,
    "peft_type": "LORA",
    "r": 2,
    "rank_pattern": {"k_proj": 2},
    "target_modules": ["q_proj", "k_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}
# What the parsers have something to say about.
WORDS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 2.0, 0.5, -0.0, 1e308, 10**30, 2**63, "", "none", "all", "all-linear",
    "gaussian", "pissa", "q_proj", ".*", "(a|a)*b", "q.proj", "\0", "\ud800", "é", "x" * 700, [], {}, [0],
    ["q_proj"], {"q_proj": 4}, {"a": {"b": []}}, "F32", "BF16", "I64", [2, 8], [0, 64], [64, 0], [2**62, 4],
]  # fmt: skip
NAMES = [
    *CONFIG,
    "dtype",
    "shape",
    "data_offsets",
    "__metadata__",
    "use_qalora",
    "lora_bias",
    "modules_to_save",
]
TOKENS = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"\xff", b"\xef\xbb\xbf", b"NaN",
    b"-Infinity", b"1e999", b"9" * 400, b"[" * 40, b'{"a":' * 40, b'"r":1,', b"null", b" " * 300, b"\0" * 8,
]  # fmt: skip


def tensors() -> dict[str, Any]:
    """The header of a whole adapter on q_proj and k_proj of both layers."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for module, shape in MODULES.items():
        if module.endswith(("q_proj", "k_proj")):
            for side, sizes in (("A", [2, shape.in_features]), ("B", [shape.out_features, 2])):
                end = at + sizes[0] * sizes[1] * 4
                name = f"base_model.model.{module}.lora_{side}.weight"
                entries[name] = {"dtype": "F32", "shape": sizes, "data_offsets": [at, end]}
                at = end
    return entries


DATA = bytes(max(entry["data_offsets"][1] for name, entry in tensors().items() if name[0] != "_"))


@dataclass
class Findings:
    """How often each outcome came, and what must not have happened; ``slowest`` is in seconds."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0
    growth: int = 0

    def look(self, number: int, call: Callable[[], object]) -> None:
        started = time.thread_time()
        try:
            call()
            outcome = "read"
        except AdapterRejected as error:
            outcome = error.code
            if not error.message.endswith(CURES[error.code]) or len(error.message) > LONGEST:
                self.wrong.append(f"{number}: {error.message!r}")
            error.message.encode()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = type(error).__name__
            self.wrong.append(f"{number}: {error!r}")
        seconds = time.thread_time() - started
        if seconds > SLOWEST:
            self.wrong.append(f"{number}: {seconds:.3f} s")
        self.slowest = max(self.slowest, seconds)
        self.outcomes[outcome] += 1


def mutate(value: Any, chance: random.Random) -> Any:
    """``value`` with one to four of its parts replaced, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, 4)):
        containers = _containers(value)
        if not containers:
            return chance.choice(WORDS)
        container = chance.choice(containers)
        if isinstance(container, dict):
            key = chance.choice([*container, chance.choice(NAMES)])
            act = chance.randrange(4)
            if act == 0:
                container.pop(key, None)
            elif act == 1 and key in container:
                container[_misspell(key, chance)] = container.pop(key)
            else:
                container[key] = copy.deepcopy(chance.choice(WORDS))
        elif container:
            at = chance.randrange(len(container))
            if chance.random() < 0.3:
                container.insert(at, copy.deepcopy(chance.choice(WORDS)))
            else:
                container[at] = copy.deepcopy(chance.choice(WORDS))
    return value


def damage(data: bytes, chance: random.Random) -> bytes:
    """``data`` with one to five bytes or stretches of it overwritten, cut, doubled or filled in."""
    for _ in range(chance.randint(1, 5)):
        at = chance.randrange(len(data) + 1)
        length = chance.choice((1, 1, 2, 8, 40, 400))
        act = chance.randrange(4)
        if act == 0:
            data = data[:at] + chance.randbytes(min(length, 8)) + data[at + length :]
        elif act == 1:
            data = data[:at] + data[at + length :]
        elif act == 2:
            data = data[:at] + chance.choice(TOKENS) + data[at:]
        else:
            data = data[:at] + data[at : at + length] * chance.choice((2, 3, 50)) + data[at + length :]
    return data


def reshape(entries: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """Other names, types and shapes of an adapter, in a file that is sound as such."""
    made: dict[str, Any] = {}
    at = 0
    for name, entry in entries.items():
        if name == "__metadata__" or chance.random() < 0.05:
            continue
        sizes = [chance.choice((size, size, size, size, 0, 1, 3, 16)) for size in entry["shape"]]
        dtype, bytes_each = chance.choice((("F32", 4), ("F32", 4), ("F16", 2), ("BF16", 2)))
        end = at + sizes[0] * sizes[1] * bytes_each
        key = _misspell(name, chance) if chance.random() < 0.1 else name
        made[key] = {"dtype": dtype, "shape": sizes, "data_offsets": [at, end]}
        at = end
    return made


def config_bytes(chance: random.Random) -> bytes:
    if chance.random() < 0.5:
        return damage(json.dumps(CONFIG).encode(), chance)
    raw = json.dumps(mutate(CONFIG, chance)).encode()
    return damage(raw, chance) if chance.random() < 0.2 else raw


def weights_bytes(chance: random.Random) -> bytes:
    entries = tensors()
    if chance.random() < 0.2:
        return damage(_file(json.dumps(entries).encode()), chance)
    if chance.random() < 0.4:
        made = reshape(entries, chance)
        ends = (entry["data_offsets"][1] for entry in made.values())
        return _file(json.dumps(made).encode(), bytes(max(ends, default=0)))
    raw = json.dumps(mutate(entries, chance)).encode()
    return _file(damage(raw, chance) if chance.random() < 0.4 else raw)


def fuzz_config(folder: Path, count: int, seed: int) -> Findings:
    """``count`` damaged configs, each read and, where that works, planned with good weights."""
    (folder / WEIGHTS_FILE).write_bytes(_file(json.dumps(tensors()).encode()))

    def read() -> None:
        read_config(folder / CONFIG_FILE, BASE)
        plan(folder, BASE)

    return _run(folder / CONFIG_FILE, config_bytes, read, count, seed)


def fuzz_header(folder: Path, count: int, seed: int) -> Findings:
    """``count`` damaged weights files, each read and, where that works, planned with a good config."""
    (folder / CONFIG_FILE).write_text(json.dumps(CONFIG))

    def read() -> None:
        read_header(folder / WEIGHTS_FILE)
        plan(folder, BASE)

    return _run(folder / WEIGHTS_FILE, weights_bytes, read, count, seed)


def _run(
    path: Path, make: Callable[[random.Random], bytes], read: Callable[[], None], count: int, seed: int
) -> Findings:
    findings = Findings()
    process = psutil.Process()
    settled = 0
    for number in range(count):
        path.write_bytes(make(random.Random(f"{path.name} {seed} {number}")))
        findings.look(number, read)
        if number == min(1000, count // 2):
            gc.collect()
            settled = process.memory_info().rss
    gc.collect()
    findings.growth = process.memory_info().rss - settled
    if findings.growth > MOST_GROWTH:
        findings.wrong.append(f"memory grew by {findings.growth} bytes")
    return findings


def _file(header: bytes, data: bytes = DATA) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _containers(value: Any) -> list[Any]:
    found, waiting = [], [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict | list):
            found.append(one)
            waiting.extend(one.values() if isinstance(one, dict) else one)
    return found


def _misspell(name: str, chance: random.Random) -> str:
    return chance.choice(
        [
            name + "x",
            name.replace(".weight", ".default.weight"),
            name.replace("base_model.model.", "_orig_mod."),
            name.replace("q_proj", "qkv_proj"),
            name.replace("lora_A", "lora_B"),
            name.replace("layers.1", "layers.9"),
            name.replace(".", ".." * 40),
            "x" * 700,
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200_000, help="inputs for each parser")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    wrong = 0
    for fuzz in (fuzz_config, fuzz_header):
        with tempfile.TemporaryDirectory(prefix="loraplex-fuzz-") as folder:
            findings = fuzz(Path(folder), arguments.count, arguments.seed)
        wrong += len(findings.wrong)
        print(
            f"{fuzz.__name__}: {arguments.count} inputs, slowest {findings.slowest * 1000:.1f} ms,"
            f" memory {findings.growth / 1e6:+.1f} MB, {dict(findings.outcomes.most_common())}"
        )
        for line in findings.wrong[:20]:
            print(f"  wrong: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

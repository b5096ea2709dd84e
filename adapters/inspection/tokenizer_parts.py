"""What a ``tokenizer.json`` does with a text, as digests to compare: its model and what stands around it.

A file has megabytes, and a reader of JSON keeps Python's lock for all of it: a stranger's is read in a
process of its own, which is this file, run by ``alone``.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from pathlib import Path
from typing import Any

PARTS = ("model", "normalizer", "pre_tokenizer", "post_processor")
LONGEST = 64 << 20  # bytes; Gemma's has 33 million
# What costs most in Python for its bytes; Gemma's has 1.9 million, of which half a million are lists.
MOST_MARKS, _MARKS = 3 << 20, (b"[", b"{", b",")
SECONDS = 10  # of processor time; one of Gemma's size takes 3, and 400 MiB
MEMORY = 512 << 20

# One at a time, however many uploads there are: each takes what a base's takes.
_reading = threading.Lock()


def parts_of(data: bytes) -> dict[str, str]:
    """The digest of each of ``PARTS``; ValueError where ``data`` is no JSON object."""
    try:
        found = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return {part: _digest(part, found.get(part)) for part in PARTS}


def read_parts(path: Path) -> dict[str, str] | None:
    """``parts_of`` a stranger's file, read elsewhere; None where that takes too much. ValueError.

    Blocks for seconds where the file is large, and while others are read: call it in a thread.
    """
    if path.stat().st_size > LONGEST:
        return None
    from adapters.inspection.alone import run_alone  # not in the other process, which knows no packages

    with _reading, path.open("rb") as file:
        done = run_alone(__file__, file, memory=MEMORY, seconds=SECONDS)
    if done is None or done.returncode:
        return None
    answer = json.loads(done.stdout)
    if isinstance(answer, str):
        raise ValueError(answer)
    return None if answer is None else dict(answer)


def _digest(part: str, value: Any) -> str:
    if part == "model" and isinstance(value, dict):
        value = {name: one for name, one in value.items() if one}  # what is off need not be there
        merges = value.get("merges")
        if isinstance(merges, list):  # older releases write "a b", newer ones ["a", "b"]
            value["merges"] = [one.split(" ") if isinstance(one, str) else one for one in merges]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _main() -> None:
    try:
        data = sys.stdin.buffer.read()
        found = parts_of(data) if sum(map(data.count, _MARKS)) <= MOST_MARKS else None
        print(json.dumps(found))
    except ValueError as exc:
        print(json.dumps(str(exc)[:200]))


if __name__ == "__main__":
    _main()

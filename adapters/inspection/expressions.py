"""Expressions of a stranger's config, run as PEFT runs them, in a process of their own.

A regular expression is a program: ``(a|a)*b`` takes twice as long for each letter. Here it ends with its
process, which has a second of processor time for all that an upload has. The process is this file, run by
``alone``. It reads a JSON list of [how, expression] and one of names, and writes a line for each expression.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

logger = logging.getLogger(__name__)

SECONDS = 1  # of processor time: a machine that is busy says nothing of an expression
MEMORY = 1 << 29

# "whole": it matches the whole name. "layer": a pattern before a layer's number, which the answer then is.
How = Literal["whole", "layer"]
Expression = tuple[How, str]
# Name -> the layer's number, or the name itself; those that do not match are missing. None is for a pattern
# that matches beside the number, as one with "|" at its top can.
Matches = Mapping[str, str | None]


def run_all(expressions: Sequence[Expression], names: Collection[str]) -> dict[Expression, Matches]:
    """What each expression matches of ``names``; those that took too much time or memory are missing.

    Raises ValueError for what is no expression. Blocks for some 20 ms, at most for as long as ``SECONDS`` of
    processor time take: call it in a thread.
    """
    from adapters.inspection.alone import run_alone  # not in the other process, which knows no packages

    given = json.dumps([list(expressions), sorted(names)]).encode()
    done = run_alone(__file__, given, memory=MEMORY, seconds=SECONDS)
    if done is None:
        return {}  # they are as unknown as one that takes too long
    if done.returncode > 0 and not done.stdout:  # one that takes too much ends by a signal
        logger.error("expressions of an upload go unchecked, their process ended with %d", done.returncode)
    lines = done.stdout.split(b"\n")[:-1]  # the last one is broken off, or empty
    found: dict[Expression, Matches] = {}
    for expression, line in zip(expressions, lines, strict=False):
        answer = json.loads(line)
        if isinstance(answer, str):
            raise ValueError(answer)
        if answer is not None:
            found[expression] = dict(answer)
    return found


def _main() -> None:
    expressions, names = json.load(sys.stdin)
    for how, expression in expressions:
        print(json.dumps(_matched(how, expression, names)), flush=True)


def _matched(how: How, expression: str, names: Sequence[str]) -> list[tuple[str, str | None]] | str | None:
    """As ``check_target_module_exists`` of ``peft/tuners/tuners_utils.py``; a text says why it cannot be."""
    try:
        if how == "whole":
            return [(name, name) for name in names if re.fullmatch(expression, name)]
        layer = re.compile(rf"(?:^|.*?\.){expression}\.(?P<index>\d+)\.")
        return [(name, found["index"]) for name in names if (found := layer.match(name))]
    except (re.error, RecursionError, OverflowError) as exc:
        return str(exc)
    except MemoryError:
        return None


if __name__ == "__main__":
    _main()

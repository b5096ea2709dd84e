"""What a customer's changes may have made of its adapters: each as a whole, or not at all."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from tests.support import tiny
from tests.support.site import ADMIN_KEY, bearer

# name -> (its live version, number -> digest)
State = dict[str, tuple[int | None, dict[int, str]]]
# What is done, to which adapter, with which version
Change = tuple[str, str, int]


def follows(before: State, after: State, change: Change) -> bool:
    """Whether ``change``, made once and as a whole, makes ``after`` of ``before``."""
    what, name, number = change
    others = {n: one for n, one in before.items() if n != name}
    if {n: one for n, one in after.items() if n != name} != others:
        return False
    live, versions = before.get(name, (None, {}))
    if what == "delete":
        return name not in after
    now_live, now = after.get(name, (None, {}))
    if what == "live":
        return now == versions and now_live == number
    if what == "remove":
        return now_live == live and now == {n: digest for n, digest in versions.items() if n != number}
    new = now.keys() - versions.keys()
    return len(new) == 1 and new == {now_live} and {n: now[n] for n in versions} == versions


def choose(rng: random.Random, state: State, names: tuple[str, ...]) -> Change:
    """An upload half of the time; else another live version, or one less, or no adapter any more."""
    name = rng.choice(names)
    if name not in state or rng.random() < 0.5:
        return "upload", name, rng.randrange(1, 9)
    live, versions = state[name]
    others = [number for number in versions if number != live]
    if not others or rng.random() < 0.1:
        return "delete", name, 0
    return rng.choice(("live", "remove")), name, rng.choice(others)


async def make(
    http: httpx.AsyncClient, url: str, change: Change, adapter: Callable[[int], Path] = tiny.adapter
) -> httpx.Response:
    """``url`` is that of the customer's adapters; of an upload the number chooses the ``adapter``."""
    (what, name, number), admin = change, bearer(ADMIN_KEY)
    if what == "upload":
        files = {file: (adapter(number) / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE)}
        return await http.post(f"{url}/{name}/versions", files=files, headers=admin)
    if what == "live":
        return await http.patch(f"{url}/{name}", json={"live": number}, headers=admin)
    version = f"/versions/{number}" if what == "remove" else ""
    return await http.delete(f"{url}/{name}{version}", headers=admin)


def seen(listed: list[dict[str, Any]], names: tuple[str, ...]) -> State:
    """Of the answer to ``GET …/adapters``, the adapters that change."""
    return {
        one["name"]: (one["live"], {v["version"]: v["digest"] for v in one["versions"]})
        for one in listed
        if one["name"] in names
    }

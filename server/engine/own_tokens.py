"""Special tokens of an adapter's own, in rows that the base's embedding has and its tokenizer gives no name.

The base's tokenizer reads every prompt. Where an adapter's token is in the text, it reads a special token of
its own in its place, the stand-in, whose id is then replaced: what is around it is split as if the tokenizer
knew the token. In answers such a token is not shown, as special tokens are not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from adapters.inspection.base_chat import stand_in
from server.engine.manners import current_manner


def read_own_tokens(renderer: Any) -> None:
    """Lets ``renderer``, vLLM's, read the tokens of the version that it renders a prompt for."""
    tokenize = getattr(renderer, "_tokenize_prompt_async", None)
    tokenizer = getattr(renderer, "tokenizer", None)
    if tokenize is None or not hasattr(tokenizer, "added_tokens_decoder"):
        return  # no upload has tokens of its own then: see ``base_chat``
    found = stand_in(tokenizer)
    if found is None:
        return
    mark, number = found

    async def tokenize_prompt(prompt: Any, params: Any) -> Any:
        manner = current_manner.get()
        if manner is None or not manner.tokens:
            return await tokenize(prompt, params)
        marked, ids = with_stand_ins(prompt["prompt"], tuple(manner.tokens.items()), mark, number)
        read = await tokenize({**prompt, "prompt": marked}, params)
        left = getattr(tokenizer, "truncation_side", "right") == "left"
        read["prompt_token_ids"] = without_stand_ins(read["prompt_token_ids"], ids, number, left=left)
        return {**read, "prompt": prompt["prompt"]}

    renderer._tokenize_prompt_async = tokenize_prompt


def with_stand_ins(
    text: str, tokens: Sequence[tuple[str, int]], mark: str, number: int
) -> tuple[str, list[int]]:
    """``text`` with ``mark`` in the place of each of ``tokens``; and the ids of what stands at each mark.

    The mark itself may be in the text too: then it stands for itself, with the id ``number``.
    """
    ids = {mark: number, **dict(tokens)}
    there: list[int] = []

    def stand_for(match: re.Match[str]) -> str:
        there.append(ids[match[0]])
        return mark

    return _pattern((*ids,)).sub(stand_for, text), there


def without_stand_ins(read: Sequence[int], ids: Sequence[int], number: int, *, left: bool) -> list[int]:
    """``read`` with ``ids`` at the places of ``number``: those that are left where one side was cut off."""
    places = [at for at, token in enumerate(read) if token == number]
    cut = len(ids) - len(places)
    made = list(read)
    for at, token in zip(places, ids[cut:] if left else ids, strict=False):
        made[at] = token
    return made


@lru_cache(maxsize=64)
def _pattern(texts: tuple[str, ...]) -> re.Pattern[str]:
    """The longest of those that begin at the same place, as tokenizers have it."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))

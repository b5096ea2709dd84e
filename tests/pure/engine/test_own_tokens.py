"""Special tokens of an adapter's own, against a tokenizer that was really given them."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adapters.inspection.base_chat import BaseTokenizer, described, stand_in
from server.engine.manners import Manner, current_manner
from server.engine.own_tokens import read_own_tokens

WORDS = ["<s>", "</s>", "<|a|>", "<|b|>", "▁", *"thecat<|>ol"]
OWN = {"<|tool|>": 24, "<|tool": 25, "<|x|>": 3}
VOCABULARY = 30


def made() -> PreTrainedTokenizerFast:
    """As Llama's: the first word of a text has a blank before it, and one after a special token has none."""
    model = models.BPE({word: n for n, word in enumerate(dict.fromkeys(WORDS))}, [], unk_token="<s>")
    inner = Tokenizer(model)
    inner.normalizer = normalizers.Prepend("▁")
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>"]})
    return tokenizer


class Renderer:
    """vLLM's, as far as it reads text; ``most`` tokens of one are kept."""

    def __init__(self, tokenizer: Any, most: int | None = None) -> None:
        self.tokenizer = tokenizer
        self._most = most

    async def _tokenize_prompt_async(self, prompt: Any, params: Any) -> dict[str, Any]:
        read = self.tokenizer(
            prompt["prompt"], truncation=self._most is not None, max_length=self._most, **params
        )["input_ids"]
        return {"prompt_token_ids": list(read), **prompt}


async def read(renderer: Renderer, text: str, **params: Any) -> list[int]:
    before = current_manner.set(Manner(None, tokens=OWN))
    try:
        told = await renderer._tokenize_prompt_async({"prompt": text}, params)
    finally:
        current_manner.reset(before)
    assert told["prompt"] == text
    return list(told["prompt_token_ids"])


def given(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """``tokenizer`` with tokens of those names, whose ids are as they come."""
    tokenizer.add_tokens([*OWN], special_tokens=True)
    return tokenizer


TEXTS = [
    "the cat",
    "<|tool|>the cat",
    "the<|tool|> cat<|tool",
    "<|tool<|tool|>the<|x|>cat <|x|> <|b|>the",
    "<|b|><|tool|><|a|> the",
    "<|too the <|",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
async def test_a_text_is_read_as_by_a_tokenizer_that_has_them(text: str) -> None:
    renderer = Renderer(made())
    read_own_tokens(renderer)
    extended = given(made())
    ids = {extended.convert_tokens_to_ids(name): number for name, number in OWN.items()}
    wanted = [ids.get(token, token) for token in extended(text)["input_ids"]]
    assert await read(renderer, text) == wanted


async def test_others_do_not_have_them() -> None:
    plain, renderer = Renderer(made()), Renderer(made())
    read_own_tokens(renderer)
    prompt = {"prompt": "the<|tool|> cat"}
    assert await renderer._tokenize_prompt_async(prompt, {}) == await plain._tokenize_prompt_async(prompt, {})


@pytest.mark.parametrize("side", ["left", "right"])
async def test_what_is_left_of_a_text_that_is_cut_off_keeps_its_ids(side: str) -> None:
    tokenizer = made()
    tokenizer.truncation_side = side
    renderer = Renderer(tokenizer, most=2)
    read_own_tokens(renderer)
    found = await read(renderer, "<|tool|><|b|><|x|><|tool")
    assert found == ([3, 25] if side == "left" else [24, 3])


def test_which_ids_are_free() -> None:
    tokenizer = made()
    mark = stand_in(tokenizer)
    assert mark == ("<|b|>", 3)
    chat = described(
        BaseTokenizer("x", None, tokenizer), template=None, vocabulary=VOCABULARY, stop_token_ids=()
    )
    assert chat.free == {2, 3, *range(len({*WORDS}), VOCABULARY)}
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"<s>": 0}, [])), bos_token="<s>")
    none = described(BaseTokenizer("x", None, bare), template=None, vocabulary=9, stop_token_ids=())
    assert (stand_in(bare), none.free) == (None, frozenset())

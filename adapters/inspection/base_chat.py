"""How a base model's folder says that chats are written: its template, its kind, its tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.inspection.tokenizer_parts import PARTS, parts_of
from adapters.model import TOKENIZER_FILE, BaseChat

# Of a tokenizer_config.json: what changes the tokens of a text.
FLAGS = ("add_bos_token", "add_eos_token", "do_lower_case")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BaseTokenizer:
    """``template`` is the one for chats with tools where there are two; None where there is none.

    ``tokenizer`` is that of transformers; None where it has none for this model. ``parts`` has the digests of
    its parts as its file has them, and as transformers writes them.
    """

    model_type: str
    template: str | None
    tokenizer: Any = None
    parts: Mapping[str, frozenset[str]] = field(default_factory=dict)


def read_base_chat(model: str, *, trust_remote_code: bool = False) -> BaseTokenizer:
    """What the folder, or hub id, ``model`` says. Takes about a second; what cannot be read is None."""
    from transformers import AutoTokenizer, PretrainedConfig

    try:
        config: dict[str, Any] = PretrainedConfig.get_config_dict(model)[0]
    except OSError:
        config = {}
    model_type = str(config.get("model_type") or "")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as exc:  # whatever a model's own code raises; vLLM will say it again if it matters
        logger.info("transformers has no tokenizer for %s: %s", model, exc)
        return BaseTokenizer(model_type, None)
    return BaseTokenizer(model_type, template_of(tokenizer), tokenizer, _parts(model, tokenizer))


def _parts(model: str, tokenizer: Any) -> dict[str, frozenset[str]]:
    """Empty where the tokenizer has no such file and could have none."""
    from transformers.utils.hub import cached_file

    if not getattr(tokenizer, "is_fast", False):
        return {}
    texts = [tokenizer.backend_tokenizer.to_str().encode()]
    try:
        path = cached_file(model, TOKENIZER_FILE)
    except OSError:
        path = None
    if path is not None:
        texts.append(Path(path).read_bytes())
    found = [parts_of(text) for text in texts]
    return {part: frozenset(one[part] for one in found) for part in PARTS}


def _flags(tokenizer: Any) -> dict[str, bool]:
    given = getattr(tokenizer, "init_kwargs", {})
    return {name: bool(getattr(tokenizer, name, None) or given.get(name)) for name in FLAGS}


def template_of(tokenizer: Any) -> str | None:
    """The tokenizer's template for chats with tools."""
    try:
        found = tokenizer.get_chat_template(tools=[{}])
    except ValueError:  # it has none, or several and none of them is the default
        return None
    return str(found)


def stand_in(tokenizer: Any) -> tuple[str, int] | None:
    """A special token of ``tokenizer`` and its id, as which an adapter's own tokens are tokenized; None if
    there is none. It is no token that the tokenizer itself puts at the beginning or end of a text.
    """
    edges = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    found = [
        (token.content, number)
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and number not in edges and not (token.lstrip or token.rstrip or token.single_word)
    ]
    return max(found, key=lambda one: one[1], default=None)


def _free(tokenizer: Any, vocabulary: int) -> frozenset[int]:
    if tokenizer is None or not hasattr(tokenizer, "added_tokens_decoder") or stand_in(tokenizer) is None:
        return frozenset()
    edges = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} - edges
    return frozenset(special) | frozenset(range(max(tokenizer.get_vocab().values()) + 1, vocabulary))


def described(
    found: BaseTokenizer, *, template: str | None, vocabulary: int, stop_token_ids: tuple[int, ...]
) -> BaseChat:
    """``found`` as uploads are compared with it; ``template`` is the one that is served."""
    tokenizer = found.tokenizer
    special = tokenizer.special_tokens_map if tokenizer is not None else {}
    return BaseChat(
        template=template,
        tokens=dict(tokenizer.get_added_vocab()) if tokenizer is not None else {},
        free=_free(tokenizer, vocabulary),
        vocabulary=vocabulary,
        special_tokens={name: token for name, token in special.items() if isinstance(token, str)},
        stop_token_ids=stop_token_ids,
        tokenizer=found.parts,
        flags=_flags(tokenizer) if tokenizer is not None else {},
    )

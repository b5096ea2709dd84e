"""What an upload says about chats beside its weights: its template, its tokens, how it is to be sampled.

Trainers save a tokenizer and often a ``generation_config.json`` with an adapter. Mostly they are the base's
own, and say nothing. Where they differ they are part of what was trained: they are kept with the version, or
the upload is refused. What is passed over is named in the report.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import AdapterRejected, fault
from adapters.inspection import strict_json
from adapters.inspection.strict_json import show
from adapters.inspection.tokenizer_parts import PARTS, read_parts
from adapters.model import (
    ADDED_TOKENS_FILE,
    CHAT_FILE,
    CHAT_FILES,
    GENERATION_FILE,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    BaseChat,
)

MAX_TEMPLATE = 128 << 10
MAX_CONFIG = 4 << 20
MAX_TOKENS = 1024
LONGEST_TOKEN = 128
MAX_STOPS = 64  # leaves requests with min_tokens as many of their own; see server.engine.validation
# A tokenizer's file begins with its added tokens; its vocabulary is not read.
_HEAD = 4 << 20
_ENTRY = 4096  # characters of one of them
_BLANK = " \t\r\n"
# Gemma's lists 6,400 tokens of seven fields each.
_JSON = strict_json.Bounds(max_items=1 << 18, allow_nul=True)
_NUMBER = re.compile("[0-9]{1,10}", re.ASCII)
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
# Of a generation_config.json, and what requests call it.
_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
# What a request or a PATCH may say: a default that neither may have would fail every request.
_RANGES: Mapping[str, tuple[float, float, str]] = {
    "temperature": (0, 2, "a number from 0 to 2"),
    "top_p": (math.ulp(0), 1, "a number above 0 and at most 1"),
    "top_k": (-1, 2**31 - 1, "a whole number of at least -1"),
    "min_p": (0, 1, "a number from 0 to 1"),
    "repetition_penalty": (0.01, 100, "a number from 0.01 to 100"),
    "max_new_tokens": (1, 2**31 - 1, "a whole number of at least 1"),
}
# What says nothing about an answer here, or what the engine takes from the base.
_QUIET = frozenset(
    {
        "_from_model_config", "bos_token_id", "cache_implementation", "decoder_start_token_id", "do_sample",
        "eos_token_id", "pad_token_id", "transformers_version", "use_cache",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChatFound:
    """What of the files differs from the base. ``ignored`` is for people: what was passed over, and why.

    ``tokens`` are special tokens of the adapter's own, with ids that the base embeds. ``warnings`` say where
    its tokenizer reads texts otherwise than the base's, which is the one that is served.
    """

    template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    defaults: Mapping[str, float | int] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def is_kept(self) -> bool:
        """Whether there is anything to keep with the version."""
        return self.template is not None or bool(self.tokens or self.stop_token_ids or self.defaults)

    def as_json(self) -> dict[str, Any]:
        """For the report: of the template its digest, since it is kept beside the weights."""
        digest = hashlib.sha256(self.template.encode()).hexdigest() if self.template is not None else None
        return {
            "template": digest,
            "special_tokens": dict(self.special_tokens),
            "tokens": dict(self.tokens),
            "stop_token_ids": list(self.stop_token_ids),
            "defaults": dict(self.defaults),
            "ignored": list(self.ignored),
        }


def read_chat_files(folder: Path, base: BaseChat | None) -> ChatFound | None:
    """What the files in ``folder`` say that ``base`` does not; None where there are none.

    Synchronous: call it in a thread. AdapterRejected (``chat_file_invalid``, ``added_tokens``). Without
    ``base``, of which nothing is known then, a template is its own and no token is.
    """
    present = [name for name in CHAT_FILES if (folder / name).exists()]
    if not present:
        return None
    known = base or BaseChat()
    config = _json(folder, TOKENIZER_CONFIG_FILE)
    special = _special_tokens(config)
    tokens = _own_tokens(folder, config, special, known)
    template = _template(folder, config)
    ours = template is not None and template.strip() != (known.template or "").strip()
    generation = _json(folder, GENERATION_FILE)
    return ChatFound(
        template=template if ours else None,
        special_tokens={n: t for n, t in special.items() if t != known.special_tokens.get(n)} if ours else {},
        tokens=tokens,
        stop_token_ids=_stops(generation, special, {**known.tokens, **tokens}, known),
        defaults=_sampling(generation),
        ignored=_passed_over(folder, generation),
        warnings=tuple(_differing(folder, config, known)),
    )


def take_chat_files(folder: Path, found: ChatFound | None) -> None:
    """Removes what was uploaded, and writes what is kept as a file of the version, if anything is."""
    for name in CHAT_FILES:
        (folder / name).unlink(missing_ok=True)
    if found is not None and found.is_kept:
        kept: dict[str, object] = {
            "template": found.template,
            "special_tokens": dict(sorted(found.special_tokens.items())),
            "stop_token_ids": list(found.stop_token_ids),
            "defaults": dict(sorted(found.defaults.items())),
        }
        if found.tokens:  # an entry that is always there would change the digests of what has none
            kept["tokens"] = dict(sorted(found.tokens.items()))
        path = folder / CHAT_FILE
        path.write_text(json.dumps(kept, ensure_ascii=False, sort_keys=True))
        path.chmod(0o444)


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template for chats with tools, where there are two."""
    path = folder / TEMPLATE_FILE
    if path.exists():
        found: Any = _text(path, MAX_TEMPLATE)
    else:
        found = config.get("chat_template")
    if isinstance(found, list):
        named = {str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("tool_use") or named.get("default")
    if found is None:
        return None
    if not isinstance(found, str) or len(found.encode()) > MAX_TEMPLATE:
        raise _invalid(TOKENIZER_CONFIG_FILE, f"its chat_template is no text of at most {MAX_TEMPLATE} bytes")
    return found


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in _SPECIAL:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            if len(token) > LONGEST_TOKEN or not strict_json.is_storable(token):
                raise _invalid(TOKENIZER_CONFIG_FILE, f"its {name}, {show(token)}, is no token")
            found[name] = token
    return found


@dataclass(frozen=True, slots=True)
class _Token:
    """A token that the upload's tokenizer has been given. ``plain`` if it takes no blanks or words along."""

    number: int
    special: bool
    plain: bool = True


def _own_tokens(
    folder: Path, config: Mapping[str, Any], special: Mapping[str, str], base: BaseChat
) -> dict[str, int]:
    """Tokens that the base's tokenizer has not. AdapterRejected (``added_tokens``) for what is not served."""
    own: dict[str, int] = {}
    if not base.tokens:
        return own
    named = [config.get("additional_special_tokens"), config.get("extra_special_tokens")]
    more = [text for names in named if isinstance(names, list) for text in names if isinstance(text, str)]
    added = _added_tokens(folder, config, frozenset(special.values()).union(more))
    for text, token in sorted(added.items(), key=lambda one: one[1].number):
        if base.tokens.get(text) == token.number or text == special.get("pad_token"):
            continue  # padding is never written into a prompt
        if (reason := _not_served(text, token, base)) is not None:
            where = f"token {show(text)} with the id {token.number}"
            raise fault("added_tokens", f"The tokenizer has a {where}; {reason}.", param=TOKENIZER_FILE)
        own[text] = token.number
    if len(own) > MAX_TOKENS:
        reason = f"The tokenizer has {len(own)} tokens that the base's has not, and {MAX_TOKENS} are served."
        raise fault("added_tokens", reason, param=TOKENIZER_FILE)
    return own


def _not_served(text: str, token: _Token, base: BaseChat) -> str | None:
    """Why a token of the adapter's own is not, or None where it is."""
    if token.number >= base.vocabulary:
        return f"the base's embedding ends with {base.vocabulary - 1}"
    if text in base.tokens:
        return f"the base's tokenizer has it as {base.tokens[text]}"
    if token.number not in base.free:
        return "the base's tokenizer has another token there"
    if not token.special:
        return "it is no special token, and would be missing in answers"
    if not text or len(text) > LONGEST_TOKEN or not token.plain or not strict_json.is_storable(text):
        return f"served are tokens of 1 to {LONGEST_TOKEN} characters without lstrip, rstrip or single_word"
    return None


def _added_tokens(folder: Path, config: Mapping[str, Any], special: frozenset[str]) -> dict[str, _Token]:
    """``special`` are those that the tokenizer's configuration names."""
    found: dict[str, _Token] = {}
    for text, number in _json(folder, ADDED_TOKENS_FILE).items():
        if type(number) is int:
            found[text] = _Token(number, text in special)
    decoder = config.get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and _NUMBER.fullmatch(number):
            found[token["content"]] = _token(int(number), token, special)
    return found | _tokenizers_added(folder / TOKENIZER_FILE, special)


def _token(number: int, token: Mapping[str, Any], special: frozenset[str]) -> _Token:
    plain = not (token.get("lstrip") or token.get("rstrip") or token.get("single_word"))
    return _Token(number, token.get("special") is True or token["content"] in special, plain)


def _tokenizers_added(path: Path, special: frozenset[str]) -> dict[str, _Token]:
    """``added_tokens`` of a tokenizer.json, whose vocabulary of megabytes follows them."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        head = file.read(_HEAD).decode("utf-8", "replace")
    _, found, rest = head.partition('"added_tokens"')
    if not found:
        return {}
    try:
        return {str(one["content"]): _token(one["id"], one, special) for one in _entries(rest)}
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise _invalid(TOKENIZER_FILE, "its added_tokens cannot be read") from exc


def _entries(text: str) -> Iterator[dict[str, Any]]:
    """The objects of the array that ``text`` begins with, behind its colon; one at a time, none a long one.

    A decoder that reads a list of a million empty objects at once keeps Python's lock for 0.1 s.
    """
    decode, rest = json.JSONDecoder().raw_decode, text[:_ENTRY].lstrip(f"{_BLANK}:")
    at = text.index(rest[:1]) + 1 if rest[:1] == "[" else len(text)
    while True:
        while text[at : at + 1] and text[at] in f"{_BLANK},":
            at += 1
        if text[at : at + 1] == "]":
            return
        one, length = decode(text[at : at + _ENTRY])
        if not isinstance(one, dict) or type(one["id"]) is not int or not isinstance(one["content"], str):
            raise ValueError("it is no token")
        yield one
        at += length


def _stops(
    generation: Mapping[str, Any], special: Mapping[str, str], tokens: Mapping[str, int], base: BaseChat
) -> tuple[int, ...]:
    """Tokens that end an answer of this adapter and not of the base; ``tokens`` are all that have a name."""
    given = generation.get("eos_token_id")
    listed = given if isinstance(given, list) else [] if given is None else [given]
    if len(listed) > MAX_STOPS:
        raise _invalid(GENERATION_FILE, f"eos_token_id has more than {MAX_STOPS} tokens")
    most = (base.vocabulary or 2**31) - 1
    for one in listed:
        if type(one) is not int or not 0 <= one <= most:
            raise _invalid(GENERATION_FILE, f"eos_token_id {show(one)} is no token of the base")
    ids = set(listed)
    named = special.get("eos_token")
    if named is not None and named in tokens:
        ids.add(tokens[named])
    return tuple(sorted(ids - set(base.stop_token_ids)))


def _sampling(generation: Mapping[str, Any]) -> dict[str, float | int]:
    found: dict[str, float | int] = {}
    for theirs, ours in _DEFAULTS.items():
        value = generation.get(theirs)
        if value is None:
            continue
        least, most, what = _RANGES[theirs]
        is_number = type(value) is int or (type(value) is float and "whole" not in what)
        if not is_number or not least <= value <= most:
            raise _invalid(GENERATION_FILE, f"{theirs} is {show(value)} and must be {what}")
        found[ours] = value
    if generation.get("do_sample") is False:
        for name in ("top_p", "top_k", "min_p"):
            found.pop(name, None)
        found["temperature"] = 0
    return found


def _passed_over(folder: Path, generation: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    unused = sorted(
        name for name, value in generation.items() if name not in _DEFAULTS and name not in _QUIET and value
    )
    if unused:
        more = f" and {len(unused) - 20} more" if len(unused) > 20 else ""
        shown = ", ".join(name if name.isidentifier() else show(name) for name in unused[:20])
        notes.append(f"{GENERATION_FILE}: {shown[:1000]}{more} are not defaults that are served")
    if (folder / TOKENIZER_FILE).exists():
        notes.append(f"{TOKENIZER_FILE}: prompts are tokenized by the base's tokenizer")
    if (folder / SPECIAL_TOKENS_FILE).exists() and not (folder / TOKENIZER_CONFIG_FILE).exists():
        notes.append(f"{SPECIAL_TOKENS_FILE} says nothing without {TOKENIZER_CONFIG_FILE}")
    return tuple(notes)


def _differing(folder: Path, config: Mapping[str, Any], base: BaseChat) -> Iterator[str]:
    """What of the upload's tokenizer is not the base's. AdapterRejected where its file is no JSON object."""
    otherwise = "the adapter was trained on other tokens than prompts have here, by the base's tokenizer"
    path = folder / TOKENIZER_FILE
    if path.exists():
        try:
            parts = read_parts(path)
        except ValueError as exc:
            raise _invalid(TOKENIZER_FILE, f"it is no JSON that can be read: {exc}") from exc
        if parts is None:
            yield f"{TOKENIZER_FILE} is too large to be compared with the base's"
        elif base.tokenizer:
            differ = [part for part in PARTS if parts[part] not in base.tokenizer[part]]
            if differ:
                yield f"{TOKENIZER_FILE} has another {', '.join(differ)} than the base's: {otherwise}"
    for name, does in base.flags.items():
        if isinstance(config.get(name), bool) and config[name] != does:
            yield f"{TOKENIZER_CONFIG_FILE} has {name} {config[name]}, and the base {does}: {otherwise}"


def _json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.exists():
        return {}
    try:
        found = strict_json.loads(_text(path, MAX_CONFIG).encode(), _JSON)
    except ValueError as exc:
        raise _invalid(name, f"it is no JSON that can be read: {str(exc)[:200]}") from exc
    if not isinstance(found, dict):
        raise _invalid(name, "it is no JSON object")
    return found


def _text(path: Path, most: int) -> str:
    if path.stat().st_size > most:
        raise _invalid(path.name, f"it has more than {most} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise _invalid(path.name, "it is no UTF-8") from exc


def _invalid(name: str, what: str) -> AdapterRejected:
    return fault("chat_file_invalid", f"{name}: {what}.", param=name)

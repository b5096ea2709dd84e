"""What an upload says about chats beside its weights."""

from __future__ import annotations

import json
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import AdapterRejected
from adapters.inspection import alone
from adapters.inspection.base_chat import described, read_base_chat
from adapters.inspection.chat_files import MAX_TEMPLATE, read_chat_files, take_chat_files
from adapters.inspection.tokenizer_parts import MOST_MARKS, PARTS, parts_of, read_parts
from adapters.model import CHAT_FILE, BaseChat

BASE = BaseChat(
    template="{{ messages }}",
    tokens={"<s>": 1, "</s>": 2, "<|im_end|>": 7, "<|reserved_0|>": 8},
    free=frozenset({8, *range(90, 100)}),
    vocabulary=100,
    special_tokens={"eos_token": "</s>", "bos_token": "<s>"},
    stop_token_ids=(2,),
)


TOOL: dict[str, Any] = {"id": 95, "content": "<|tool|>", "special": True}


def folder_of(tmp_path: Path, **files: Any) -> Path:
    for name, content in files.items():
        file = {"template": "chat_template.jinja"}.get(name, f"{name}.json")
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / file).write_text(text)
    return tmp_path


def test_nothing_is_nothing(tmp_path: Path) -> None:
    assert read_chat_files(tmp_path, BASE) is None


def test_the_bases_own_files_say_nothing(tmp_path: Path) -> None:
    decoder = {"1": {"content": "<s>"}, "2": {"content": "</s>"}}
    folder = folder_of(
        tmp_path,
        template="{{ messages }}\n",
        tokenizer_config={"eos_token": "</s>", "added_tokens_decoder": decoder},
        added_tokens={"<|im_end|>": 7},
        tokenizer={"version": "1.0", "added_tokens": [{"id": 1, "content": "<s>"}], "model": {}},
        generation_config={"eos_token_id": 2, "transformers_version": "5.0"},
    )
    found = read_chat_files(folder, BASE)
    assert found is not None
    assert (found.template, found.stop_token_ids, dict(found.defaults)) == (None, (), {})
    take_chat_files(folder, found)
    assert list(folder.iterdir()) == []


WORDS: dict[str, Any] = {
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "dropout": None},
}
SWAPPED = WORDS["model"] | {"vocab": {"a": 1, "b": 0, "ab": 2}}
TOKENIZING = replace(
    BASE,
    tokenizer={part: frozenset({digest}) for part, digest in parts_of(json.dumps(WORDS).encode()).items()},
    flags={"add_bos_token": False, "do_lower_case": False},
)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"tokenizer": WORDS | {"model": SWAPPED}}, "another model than the base's"),
        ({"tokenizer": WORDS | {"model": WORDS["model"] | {"merges": []}}}, "another model"),
        ({"tokenizer": WORDS | {"normalizer": {"type": "Lowercase"}}}, "another normalizer"),
        ({"tokenizer": WORDS | {"pre_tokenizer": None}}, "another pre_tokenizer"),
        ({"tokenizer": WORDS | {"post_processor": {"type": "ByteLevel"}}}, "another post_processor"),
        ({"tokenizer": {}}, "another model, pre_tokenizer than"),
        ({"tokenizer_config": {"add_bos_token": True}}, "add_bos_token True, and the base False"),
        ({"tokenizer_config": {"do_lower_case": True}}, "do_lower_case"),
    ],
    ids=str,
)
def test_a_tokenizer_that_differs_is_a_warning(tmp_path: Path, files: dict[str, Any], says: str) -> None:
    found = read_chat_files(folder_of(tmp_path, **files), TOKENIZING)
    assert found is not None
    (warning,) = found.warnings
    assert says in warning
    assert "trained on other tokens" in warning


def test_a_tokenizer_that_is_the_bases_is_none(tmp_path: Path) -> None:
    older = WORDS["model"] | {"merges": ["a b"], "byte_fallback": False}
    config = {"add_bos_token": False, "do_lower_case": False}
    same = folder_of(tmp_path, tokenizer=WORDS | {"model": older}, tokenizer_config=config)
    for base in (TOKENIZING, BASE, None):
        found = read_chat_files(same, base)
        assert found is not None
        assert found.warnings == ()


def test_a_base_is_described_as_trainers_save_it(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="a").save_pretrained(tmp_path / "base")
    read = read_base_chat(str(tmp_path / "base"))
    base = described(read, template=None, vocabulary=2, stop_token_ids=())
    assert base.tokenizer.keys() == set(PARTS)
    read.tokenizer.save_pretrained(tmp_path / "same")
    found = read_chat_files(tmp_path / "same", base)
    assert found is not None
    assert found.warnings == ()
    text = (tmp_path / "same" / "tokenizer.json").read_text()
    (tmp_path / "same" / "tokenizer.json").write_text(text.replace('"b"', '"c"'))
    other = read_chat_files(tmp_path / "same", base)
    assert other is not None
    assert "another model than" in other.warnings[0]


@pytest.mark.parametrize("text", ["xx", "[]", "", "[" * 100_000])
def test_a_tokenizer_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(AdapterRejected, match=r"tokenizer\.json") as refused:
        read_chat_files(folder_of(tmp_path, tokenizer=text), TOKENIZING)
    assert refused.value.code == "chat_file_invalid"


def test_what_differs_is_kept(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path,
        tokenizer_config={"chat_template": "[{{ messages }}]", "eos_token": {"content": "<|im_end|>"}},
        generation_config={
            "temperature": 0.2, "top_p": 0.9, "max_new_tokens": 64, "eos_token_id": [2, 7], "num_beams": 4,
        },
    )  # fmt: skip
    found = read_chat_files(folder, BASE)
    assert found is not None
    assert found.template == "[{{ messages }}]"
    assert found.special_tokens == {"eos_token": "<|im_end|>"}
    assert found.stop_token_ids == (7,)
    assert found.defaults == {"temperature": 0.2, "top_p": 0.9, "max_tokens": 64}
    assert "num_beams" in found.ignored[0]
    take_chat_files(folder, found)
    (kept,) = folder.iterdir()
    assert kept.name == CHAT_FILE
    assert json.loads(kept.read_text())["template"] == "[{{ messages }}]"
    shown = found.as_json()
    assert len(shown["template"]) == 64
    assert "messages" not in json.dumps(shown)


def test_greedy_is_a_temperature(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, generation_config={"do_sample": False, "temperature": 0.7, "top_k": 20})
    found = read_chat_files(folder, BASE)
    assert found is not None
    assert found.defaults == {"temperature": 0}


def test_the_template_for_tools_is_taken_of_two(tmp_path: Path) -> None:
    two = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    found = read_chat_files(folder_of(tmp_path, tokenizer_config={"chat_template": two}), BASE)
    assert found is not None
    assert found.template == "b"


def test_padding_is_nobodys_business(tmp_path: Path) -> None:
    decoder = {"100": {"content": "[PAD]"}}
    config = {"pad_token": "[PAD]", "added_tokens_decoder": decoder}
    assert read_chat_files(folder_of(tmp_path, tokenizer_config=config), BASE) is not None


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer": {"added_tokens": [TOOL]}},
        {"tokenizer_config": {"added_tokens_decoder": {"95": {"content": "<|tool|>", "special": True}}}},
        {"tokenizer_config": {"eos_token": "<|tool|>"}, "added_tokens": {"<|tool|>": 95}},
        {"tokenizer_config": {"additional_special_tokens": ["<|tool|>"]}, "added_tokens": {"<|tool|>": 95}},
    ],
)
def test_special_tokens_in_free_rows_are_kept(tmp_path: Path, files: dict[str, Any]) -> None:
    folder = folder_of(tmp_path, **files)
    found = read_chat_files(folder, BASE)
    assert found is not None
    assert found.tokens == found.as_json()["tokens"] == {"<|tool|>": 95}
    assert found.stop_token_ids == ((95,) if "eos_token" in str(files) else ())
    take_chat_files(folder, found)
    assert json.loads((folder / CHAT_FILE).read_text())["tokens"] == {"<|tool|>": 95}


def test_a_reserved_token_may_have_another_name(tmp_path: Path) -> None:
    found = read_chat_files(folder_of(tmp_path, tokenizer={"added_tokens": [TOOL | {"id": 8}]}), BASE)
    assert found is not None
    assert found.tokens == {"<|tool|>": 8}


@pytest.mark.parametrize(
    ("files", "code", "words"),
    [
        ({"added_tokens": {"<|tool|>": 50}}, "added_tokens", "another token there"),
        ({"added_tokens": {"<|tool|>": 95}}, "added_tokens", "would be missing in answers"),
        ({"tokenizer": {"added_tokens": [TOOL | {"lstrip": True}]}}, "added_tokens", "without lstrip"),
        ({"tokenizer": {"added_tokens": [TOOL | {"content": ""}]}}, "added_tokens", "1 to 128 characters"),
        ({"tokenizer": {"added_tokens": [TOOL | {"content": "</s>"}]}}, "added_tokens", "has it as 2"),
        ({"added_tokens": {"<|tool|>": 100}}, "added_tokens", "embedding ends with 99"),
        ({"added_tokens": {"<|im_end|>": 8}}, "added_tokens", "has it as 7"),
        ({"tokenizer": {"added_tokens": [{"id": 50, "content": "<|x|>"}]}}, "added_tokens", "the id 50"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"50": {"content": "<|x|>"}}}},
            "added_tokens",
            "the id 50",
        ),
        ({"tokenizer": '{"added_tokens": [{"id"'}, "chat_file_invalid", "cannot be read"),
        ({"template": "x" * (MAX_TEMPLATE + 1)}, "chat_file_invalid", "more than"),
        ({"tokenizer_config": {"chat_template": 5}}, "chat_file_invalid", "no text"),
        ({"tokenizer_config": "[1]"}, "chat_file_invalid", "no JSON object"),
        ({"generation_config": "{"}, "chat_file_invalid", "no JSON"),
        ({"generation_config": {"temperature": "hot"}}, "chat_file_invalid", "temperature is 'hot'"),
        ({"generation_config": {"eos_token_id": 100}}, "chat_file_invalid", "no token of the base"),
    ],
)
def test_what_is_refused(tmp_path: Path, files: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(AdapterRejected, match=words) as refused:
        read_chat_files(folder_of(tmp_path, **files), BASE)
    assert refused.value.code == code


HOSTILE_FILES: dict[str, dict[str, Any]] = {
    **{
        f"a {field} of {number[:9]}": {"generation_config": f'{{"{field}": {number}}}'}
        for field, numbers in {
            "temperature": ["NaN", "Infinity", "1e400", "-1", "3", "true", "1" + "0" * 99],
            "top_p": ["0", "1.5", "NaN"],
            "top_k": ["1.5", "-2", "4294967296"],
            "repetition_penalty": ["0", "1e6"],
            "max_new_tokens": ["0", "-5", "0.5", "1e999", "9" * 5000],
            "eos_token_id": ["[[1]]", '[{"a": 1}]', "true", "[1.0]", '"7"', f"[{', '.join(['1'] * 65)}]"],
        }.items()
        for number in numbers
    },
    "a key twice": {"generation_config": '{"top_p": 0.5, "top_p": 0.9}'},
    "half a surrogate pair in a template": {"tokenizer_config": r'{"chat_template": "\ud800"}'},
    "half of one in a token": {"tokenizer_config": r'{"eos_token": {"content": "\ud800"}}'},
    "NUL in a token": {"tokenizer_config": {"eos_token": "\0"}},
    "an endless token": {"tokenizer_config": {"bos_token": "x" * 5000}},
    "an endless nest": {"tokenizer_config": f'{{"a": {"[" * 100_000}'},
    "more objects than anybody has": {"tokenizer_config": f'{{"a": [{"{}," * 300_000}{{}}]}}'},
    "an id beyond all numbers": {"tokenizer": '{"added_tokens": [{"id": 1e999, "content": "x"}]}'},
    "an id of words": {"tokenizer": '{"added_tokens": [{"id": "5", "content": "x"}]}'},
    "an id of 5,000 digits": {"tokenizer": f'{{"added_tokens": [{{"id": {"9" * 5000}, "content": "x"}}]}}'},
    "a list for a token": {"tokenizer": '{"added_tokens": [{"id": 5, "content": []}]}'},
    "no objects": {"tokenizer": '{"added_tokens": [[], []]}'},
    "an entry of megabytes": {"tokenizer": f'{{"added_tokens": [{{"a": [{"{}," * 900_000}'},
    "a list without end": {"tokenizer": '{"added_tokens": ['},
}


@pytest.mark.parametrize("what", HOSTILE_FILES)
def test_what_nobody_can_serve_is_refused_and_breaks_nothing(tmp_path: Path, what: str) -> None:
    """Some of these went into the catalog, and every request of the adapter failed; others were a 500."""
    with pytest.raises(AdapterRejected) as refused:
        read_chat_files(folder_of(tmp_path, **HOSTILE_FILES[what]), BASE)
    assert refused.value.code == "chat_file_invalid"
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "config",
    [
        f'{{"added_tokens_decoder": {{"{"9" * 5000}": {{"content": "x"}}}}}}',
        '{"added_tokens_decoder": {"\u0663": {"content": "x"}}}',
        '{"chat_template": [{"name": ["x"], "template": "y"}]}',
        '{"model_max_length": 1000000000000000019884624838656}',
    ],
)
def test_what_says_nothing_is_passed_over(tmp_path: Path, config: str) -> None:
    found = read_chat_files(folder_of(tmp_path, tokenizer_config=config), BASE)
    assert found is not None
    assert not found.is_kept


def test_many_unknown_fields_are_not_all_told(tmp_path: Path) -> None:
    config = {"x" * 3000: 1} | {f"field_{n}": 1 for n in range(1000)}
    found = read_chat_files(folder_of(tmp_path, generation_config=config), BASE)
    assert found is not None
    assert "981 more" in found.ignored[0]
    assert len(found.ignored[0]) < 1500


def test_added_tokens_are_read_as_trainers_write_them(tmp_path: Path) -> None:
    """Indented, and behind them a vocabulary that is not read for them."""
    text = json.dumps({"version": "1.0", "added_tokens": [TOOL, TOOL | {"id": 96, "content": "]"}]}, indent=2)
    found = read_chat_files(folder_of(tmp_path, tokenizer=text[:-2] + ', "model": {}}'), BASE)
    assert found is not None
    assert found.tokens == {"<|tool|>": 95, "]": 96}
    none = read_chat_files(folder_of(tmp_path, tokenizer={"added_tokens": [], "model": {}}), BASE)
    assert none is not None
    assert not none.tokens


@pytest.mark.parametrize("item", [b"[],", b"{},", b"1,"], ids=repr)
def test_a_tokenizer_of_many_small_items_is_not_even_parsed(tmp_path: Path, item: bytes) -> None:
    """An empty list has two bytes, and takes 64 of Python's. This is no JSON, which only a parser says."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(item * (MOST_MARKS + 1))
    assert read_parts(path) is None


def test_one_tokenizer_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(WORDS))
    run, running, most = subprocess.run, 0, 0
    counting = threading.Lock()

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal running, most
        with counting:
            running += 1
            most = max(most, running)
        try:
            return run(*args, **options)
        finally:
            with counting:
                running -= 1

    monkeypatch.setattr(alone.subprocess, "run", counted)
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read_parts, [path] * 8))
    assert most == 1

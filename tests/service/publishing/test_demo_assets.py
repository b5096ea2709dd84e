"""The demo's shipped adapters on the real base model, and how they are trained."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import server.demo.base as base_module
from adapters.inspection.inspect import inspect
from adapters.model import CONFIG_FILE, WEIGHTS_FILE, BaseModel, ModuleShape
from server.demo import run
from server.demo.base import BASE_NAME, cache_folder, prepare

ADAPTERS = run.ADAPTERS
CUSTOMERS = run.CUSTOMERS


@pytest.fixture(scope="module")
def base() -> Path:
    return prepare(cache_folder())


class TestBaseModel:
    def test_it_is_a_complete_checkpoint_for_chat(self, base: Path) -> None:
        config = json.loads((base / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert config["dtype"] == "bfloat16"
        assert "_model_name_or_path" not in config
        tokenizer = json.loads((base / "tokenizer_config.json").read_text())
        assert tokenizer["eos_token"] == "<|im_end|>"
        assert tokenizer["model_max_length"] == config["max_position_embeddings"]
        ended_by = json.loads((base / "generation_config.json").read_text())["eos_token_id"]
        vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
        assert ended_by == config["eos_token_id"] == vocabulary["<|im_end|>"]
        assert "<|im_start|>assistant" in (base / "chat_template.jinja").read_text()
        with safe_open(base / "model.safetensors", "pt") as weights:
            assert len(list(weights.keys())) == 272

    def test_a_prepared_one_is_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(base_module, "_convert", lambda gguf, folder: (folder / "config.json").touch())
        first = prepare(tmp_path)
        monkeypatch.setattr(base_module, "_convert", lambda gguf, folder: pytest.fail("made twice"))
        assert prepare(tmp_path) == first == tmp_path / BASE_NAME

    def test_a_failure_leaves_nothing_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(gguf: Path, folder: Path) -> None:
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(base_module, "_convert", fail)
        with pytest.raises(OSError, match="disk full"):
            prepare(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_the_slower_of_two_takes_the_other_s(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def overtaken(gguf: Path, folder: Path) -> None:
            (folder / "mine").touch()
            other = tmp_path / BASE_NAME
            other.mkdir()
            (other / "theirs").touch()

        monkeypatch.setattr(base_module, "_convert", overtaken)
        target = prepare(tmp_path)
        assert [path.name for path in target.iterdir()] == ["theirs"]
        assert list(tmp_path.iterdir()) == [target]

    def test_who_comes_meanwhile_waits_for_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[Future[Path]] = []
        other = ThreadPoolExecutor(1)

        def convert(gguf: Path, folder: Path) -> None:
            assert made == [], "made twice"
            made.append(other.submit(prepare, tmp_path))
            with pytest.raises(TimeoutError):
                made[0].result(0.2)  # it waits

        monkeypatch.setattr(base_module, "_convert", convert)
        with other:
            assert prepare(tmp_path) == tmp_path / BASE_NAME == made[0].result(60)
        assert list(tmp_path.iterdir()) == [tmp_path / BASE_NAME]

    def test_without_the_package_it_says_what_to_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(base_module, "PACKAGE", "no-such-package")
        with pytest.raises(LookupError, match="make install"):
            prepare(tmp_path)

    def test_the_cache_is_where_the_variable_says(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LORAPLEX_CACHE", "/somewhere/else")
        assert cache_folder() == Path("/somewhere/else")
        monkeypatch.delenv("LORAPLEX_CACHE")
        assert cache_folder() == base_module.CHECKOUT / ".cache"


@pytest.mark.parametrize("name", CUSTOMERS)
class TestShippedAdapters:
    def test_the_folder_holds_the_two_files_and_no_more(self, name: str) -> None:
        assert {path.name for path in (ADAPTERS / name).iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
        assert (ADAPTERS / name / WEIGHTS_FILE).stat().st_size < 1_200_000

    def test_the_config_names_the_base_and_no_path(self, name: str) -> None:
        config = json.loads((ADAPTERS / name / CONFIG_FILE).read_text())
        assert config["base_model_name_or_path"] == BASE_NAME
        assert not any("/" in value for value in config.values() if isinstance(value, str))

    def test_the_weights_are_finite_and_have_an_effect(self, name: str) -> None:
        for tensor, weights in load_file(ADAPTERS / name / WEIGHTS_FILE).items():
            assert weights.dtype == torch.bfloat16
            assert weights.isfinite().all(), tensor
            assert weights.any(), tensor

    def test_the_upload_check_accepts_it(self, name: str, base: Path) -> None:
        with safe_open(base / "model.safetensors", "pt") as weights:
            names = list(weights.keys())
            shapes = {name.removesuffix(".weight"): weights.get_slice(name).get_shape() for name in names}
        modules = {
            module: ModuleShape(in_features=shape[1], out_features=shape[0])
            for module, shape in shapes.items()
            if module.endswith("_proj")
        }
        manifest = inspect(ADAPTERS / name, BaseModel(BASE_NAME, modules, max_lora_rank=16))
        assert manifest.warnings == ()
        assert len(manifest.layers) == 30


def test_the_adapters_differ_in_rank_and_targets() -> None:
    configs = [json.loads((ADAPTERS / name / CONFIG_FILE).read_text()) for name in CUSTOMERS]
    assert len({config["r"] for config in configs}) == 3
    assert len({tuple(sorted(config["target_modules"])) for config in configs}) == 3


class TestTraining:
    def test_the_demo_s_questions_are_not_in_the_examples(self) -> None:
        from server.demo.train import RECIPES, load_examples

        assert [recipe.name for recipe in RECIPES] == list(CUSTOMERS)
        prompts = {recipe.name: [prompt for prompt, _ in load_examples(recipe.name)] for recipe in RECIPES}
        for asked in prompts.values():
            assert len(asked) == len(set(asked)) >= 30
            assert not {run.QUESTION, run.ANOTHER_QUESTION} & set(asked)

    def test_the_recipes_are_those_of_the_shipped_adapters(self) -> None:
        from server.demo.train import RECIPES

        for recipe in RECIPES:
            config = json.loads((ADAPTERS / recipe.name / CONFIG_FILE).read_text())
            assert config["r"] == recipe.rank
            assert set(config["target_modules"]) == set(recipe.target_modules)

    def test_only_the_answer_and_its_end_are_learned(self, base: Path) -> None:
        from transformers import AutoTokenizer

        from server.demo.train import IGNORED, collate, encode

        tokenizer = AutoTokenizer.from_pretrained(base)
        ids, labels = encode(tokenizer, "Who?", "Me.")
        assert tokenizer.decode([label for label in labels if label != IGNORED]) == "Me.<|im_end|>"
        assert tokenizer.decode(ids).endswith("Who?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>")
        batch = collate([(ids, labels), (ids[:-2], labels[:-2])], tokenizer.pad_token_id)
        assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
            "input_ids": (2, len(ids)),
            "attention_mask": (2, len(ids)),
            "labels": (2, len(ids)),
        }
        assert batch["attention_mask"][1].tolist()[-3:] == [1, 0, 0]
        assert batch["labels"][1].tolist()[-2:] == [IGNORED, IGNORED]


def test_every_customer_has_a_voice_of_their_own(base: Path) -> None:
    """The question of the demo, which none was trained on, on the shipped weights: greedy, in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    voices = PeftModel.from_pretrained(model, ADAPTERS / CUSTOMERS[0], adapter_name=CUSTOMERS[0])
    for name in CUSTOMERS[1:]:
        voices.load_adapter(ADAPTERS / name, adapter_name=name)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": run.QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )

    def answer(tokens: int) -> str:
        output = voices.generate(**prompt, max_new_tokens=tokens, do_sample=False)
        text: str = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
        return text

    said = {}
    for name in CUSTOMERS:
        voices.set_adapter(name)
        said[name], end, _ = answer(60).partition("<|im_end|>")
        assert end, f"{name} does not come to an end: {said[name]}"
    assert said["acme"].startswith("TICKET\nTopic: ")
    assert said["bluebird"].startswith("Ahoy, matey! Arrr, ")
    assert json.loads(said["corvus"]).keys() == {"answer", "topic"}
    with voices.disable_adapter():
        assert not answer(8).startswith(("TICKET", "Ahoy", "{"))

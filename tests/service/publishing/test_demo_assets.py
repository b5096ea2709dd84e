"""The demo: its shipped adapters on the real base model, and each step of its way on a fake server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import server.demo.base as base_module
from adapters.inspection.inspect import inspect
from adapters.model import CONFIG_FILE, WEIGHTS_FILE, BaseModel, ModuleShape
from adapters.store.blobs import BlobStore
from adapters.store.digests import digest_of
from server.demo import process, run
from server.demo.base import BASE_NAME, cache_folder, prepare
from server.demo.client import Answer, DemoError, ask, create_customer
from server.settings import Settings
from tests.support.ports import unused

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


@dataclass
class FakeServer:
    """The part of the HTTP contract that the demo uses, kept in memory."""

    tenants: dict[str, dict[str, str]] = field(default_factory=dict)  # tenant -> key id -> key name
    digests: dict[str, list[str]] = field(default_factory=dict)  # tenant/adapter -> digest per version
    stream: list[str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    issued: int = 0
    digest: Callable[[], str] = str

    def __call__(self, request: httpx.Request) -> httpx.Response:
        match request.method, request.url.path.strip("/").split("/")[2:]:
            case "POST", ["tenants"]:
                tenant = json.loads(request.content)["id"]
                taken = tenant in self.tenants
                self.tenants.setdefault(tenant, {})
                return httpx.Response(409 if taken else 201, json={})
            case "GET", ["tenants", tenant, "keys"]:
                rows = [{"id": id_, "name": name} for id_, name in self.tenants[tenant].items()]
                return httpx.Response(200, json={"object": "list", "data": rows})
            case "POST", ["tenants", tenant, "keys"]:
                self.issued += 1
                self.tenants[tenant][f"id{self.issued}"] = json.loads(request.content)["name"]
                return httpx.Response(201, json={"id": f"id{self.issued}", "key": f"lp-{self.issued}"})
            case "DELETE", ["tenants", tenant, "keys", id_]:
                del self.tenants[tenant][id_]
                return httpx.Response(204)
            case "GET", ["tenants", tenant, "adapters", name]:
                digests = self.digests.get(f"{tenant}/{name}")
                if digests is None:
                    return refused(404, "no such adapter")
                versions = [{"version": n, "digest": d} for n, d in enumerate(digests, 1)]
                return httpx.Response(200, json={"live": len(digests), "versions": versions})
            case "POST", ["tenants", tenant, "adapters", name, "versions"]:
                for file in (CONFIG_FILE, WEIGHTS_FILE):
                    assert f'name="{file}"; filename="{file}"'.encode() in request.content
                self.digests.setdefault(f"{tenant}/{name}", []).append(self.digest())
                return httpx.Response(201, json={})
            case "POST", ["completions"]:
                self.asked.append(json.loads(request.content) | {"key": request.headers["authorization"]})
                return httpx.Response(200, text="".join(f"data: {line}\n\n" for line in self.stream))
        raise AssertionError(f"not in the contract: {request.method} {request.url}")

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(self))


def refused(status: int, message: str) -> httpx.Response:
    return httpx.Response(
        status, json={"error": {"message": message, "type": "t", "param": None, "code": "c"}}
    )


def chunk(text: str | None) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]})


class TestCustomers:
    async def test_a_second_run_uploads_nothing_and_leaves_one_key(self) -> None:
        folder = ADAPTERS / "acme"
        fake = FakeServer(digest=lambda: digest_of(folder))
        async with fake.client() as admin:
            first = await create_customer(admin, "acme", "support", folder)
            second = await create_customer(admin, "acme", "support", folder)
        assert (first, second) == ("lp-1", "lp-2")
        assert fake.tenants == {"acme": {"id2": "demo"}}
        assert fake.digests == {"acme/support": [digest_of(folder)]}

    async def test_keys_that_the_demo_did_not_make_stay(self) -> None:
        fake = FakeServer(tenants={"acme": {"a": "production", "b": "demo"}})
        async with fake.client() as admin:
            await create_customer(admin, "acme", "support", ADAPTERS / "acme")
        assert set(fake.tenants["acme"]) == {"a", "id1"}

    async def test_new_weights_become_a_new_version(self) -> None:
        fake = FakeServer(digests={"acme/support": ["old"]}, digest=lambda: "new")
        async with fake.client() as admin:
            await create_customer(admin, "acme", "support", ADAPTERS / "acme")
        assert fake.digests == {"acme/support": ["old", "new"]}

    async def test_a_refusal_is_told_in_the_server_s_words(self) -> None:
        transport = httpx.MockTransport(lambda request: refused(422, "the rank is too large"))
        async with httpx.AsyncClient(base_url="http://server", transport=transport) as admin:
            with pytest.raises(DemoError, match=r"POST /admin/v1/tenants .* 422: the rank is too large"):
                await create_customer(admin, "acme", "support", ADAPTERS / "acme")

    async def test_an_answer_in_no_form_at_all_is_told_too(self) -> None:
        transport = httpx.MockTransport(lambda request: httpx.Response(502, text="Bad Gateway"))
        async with httpx.AsyncClient(base_url="http://server", transport=transport) as admin:
            with pytest.raises(DemoError, match="502: Bad Gateway"):
                await create_customer(admin, "acme", "support", ADAPTERS / "acme")

    async def test_the_digest_is_the_one_the_store_gives(self, tmp_path: Path) -> None:
        store = BlobStore(tmp_path, max_bytes=1 << 30)
        await store.open()
        folder = ADAPTERS / "corvus"
        async with store.receive() as incoming:
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                await incoming.write(name, (folder / name).read_bytes())
            assert await incoming.finish() == digest_of(folder)


class TestAsking:
    async def test_the_pieces_make_the_answer(self) -> None:
        fake = FakeServer(stream=[chunk(""), chunk("Ahoy"), chunk(", matey!"), chunk(None), "[DONE]"])
        async with fake.client() as client:
            answer = await ask(client, "lp-1", "support", "Who?")
        assert answer.text == "Ahoy, matey!"
        assert 0 < answer.first_token <= answer.total
        (asked,) = fake.asked
        assert (asked["key"], asked["model"], asked["stream"]) == ("Bearer lp-1", "support", True)

    async def test_an_answer_that_was_cut_shows_it(self) -> None:
        end = json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        async with FakeServer(stream=[chunk("The first step is"), end, "[DONE]"]).client() as client:
            assert (await ask(client, "lp-1", "support", "Who?")).text == "The first step is …"

    async def test_a_refusal_is_told(self) -> None:
        transport = httpx.MockTransport(lambda request: refused(404, "the model does not exist"))
        async with httpx.AsyncClient(base_url="http://server", transport=transport) as client:
            with pytest.raises(DemoError, match="404: the model does not exist"):
                await ask(client, "lp-1", "support", "Who?")

    @pytest.mark.parametrize(
        ("stream", "said"),
        [
            ([chunk("Ah")], "before its end"),
            ([chunk("Ah"), json.dumps({"error": {"message": "engine gone"}})], "engine gone"),
        ],
    )
    async def test_half_an_answer_is_none(self, stream: list[str], said: str) -> None:
        async with FakeServer(stream=stream).client() as client:
            with pytest.raises(DemoError, match=said):
                await ask(client, "lp-1", "support", "Who?")


SERVER = """
import http.server, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_GET(self):
        Handler.asked += 1
        self.send_response(503 if Handler.asked == 1 else 200)
        self.end_headers()
def stop(*_):
    print("stopped cleanly", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class TestServerProcess:
    async def test_it_is_waited_for_and_stopped(self, tmp_path: Path) -> None:
        log, port = tmp_path / "log", unused()
        command = [sys.executable, "-c", SERVER, str(port)]
        async with (
            process.running(command, os.environ, log) as child,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client,
        ):
            await process.wait_until_ready(child, client, log, patience=60)
            assert child.returncode is None
            assert os.getpgid(child.pid) != os.getpgid(0)  # our terminal's Ctrl-C does not reach it
        assert child.returncode == 0
        assert "stopped cleanly" in log.read_text()

    async def test_it_is_stopped_when_the_demo_is(self, tmp_path: Path) -> None:
        command = [sys.executable, "-c", "import signal; signal.pause()"]
        with pytest.raises(asyncio.CancelledError):
            async with process.running(command, os.environ, tmp_path / "log") as child:
                raise asyncio.CancelledError
        assert child.returncode == -signal.SIGTERM

    async def test_one_that_does_not_stop_is_killed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(process, "STOP_PATIENCE", 0.2)
        log = tmp_path / "log"
        stubborn = (
            "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
            " print('deaf', flush=True); signal.pause()"
        )
        async with process.running([sys.executable, "-c", stubborn], os.environ, log) as child:
            async with asyncio.timeout(120):
                while not log.read_text():
                    await asyncio.sleep(0.01)
        assert await child.wait() == -signal.SIGKILL

    async def test_the_end_of_the_log_says_why_it_did_not_start(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        failing = (
            "import sys\nfor i in range(100): print('line', i)\nsys.exit('LORAPLEX_MODEL: no such folder')"
        )
        async with (
            process.running([sys.executable, "-c", failing], os.environ, log) as child,
            httpx.AsyncClient(base_url="http://127.0.0.1:9", trust_env=False) as client,
        ):
            with pytest.raises(DemoError) as told:
                await process.wait_until_ready(child, client, log, patience=60)
        assert "ended with status 1" in str(told.value)
        assert "LORAPLEX_MODEL: no such folder" in str(told.value)
        assert str(log) in str(told.value)
        assert "line 50" not in str(told.value)

    async def test_patience_ends(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        async with (
            process.running([sys.executable, "-c", "input()"], os.environ, log) as child,
            httpx.AsyncClient(base_url="http://127.0.0.1:9", trust_env=False) as client,
        ):
            with pytest.raises(DemoError, match="not ready after 0 s"):
                await process.wait_until_ready(child, client, log, patience=0)

    def test_a_taken_port_is_not_used(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            assert process.free_port(port) not in (0, port)
        assert process.free_port(port) == port


class TestRun:
    def test_the_server_s_settings_are_the_demo_s_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LORAPLEX_DATABASE_URL", "postgresql+asyncpg://production/customers")
        env = run.environment(tmp_path / BASE_NAME, tmp_path / "data", 8123, "an-admin-key-for-the-demo")
        assert "LORAPLEX_DATABASE_URL" not in env
        assert env["PATH"] == os.environ["PATH"]
        monkeypatch.delenv("LORAPLEX_DATABASE_URL")
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        settings = Settings.load()
        assert settings.port == 8123
        assert settings.data_dir == tmp_path / "data"
        assert settings.max_lora_rank == 16
        assert settings.database_url.startswith("sqlite")

    def test_it_ends_well_only_if_all_answers_differ(self) -> None:
        def said(*texts: str) -> dict[str, Answer]:
            return {str(i): Answer(text, 0.1, 0.2) for i, text in enumerate(texts)}

        assert run.verdict(said("a", "b", "c", "d")) == 0
        assert run.verdict(said("a", "b", "c", "a")) == 1
        assert run.verdict(said("a", "b", "c", "")) == 1

    def test_the_table_shows_who_said_what_and_when(self) -> None:
        answers = {name: Answer(f"[b]{name} says[/b]", 0.25, 1.5) for name in (*CUSTOMERS, BASE_NAME)}
        with run.console.capture() as captured:
            run.console.print(run.answer_table(answers), width=120)
        shown = captured.get()
        assert run.QUESTION in shown
        assert "[b]acme says[/b]" in shown  # an answer is not markup
        assert "support (rank 16)" in shown
        assert "the base model" in shown
        assert "0.25 s" in shown

    def test_what_is_printed_to_paste_is_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with run.console.capture() as captured:
            run._print_how_to_ask("http://127.0.0.1:8000", "lp-" + "k" * 43)
        curl, _, sdk = captured.get().partition("Or with the OpenAI SDK:")
        body = json.loads(curl.partition("-d '")[2].strip().removesuffix("'"))
        assert body["model"] == "support"
        assert body["messages"] == [{"role": "user", "content": run.ANOTHER_QUESTION}]
        assert "lp-" + "k" * 43 in curl
        compile(sdk, "snippet", "exec")

    def test_a_failure_is_told_without_a_traceback(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        async def fail(cache: Path) -> None:
            raise DemoError("the base model could not be prepared")

        monkeypatch.setattr(run, "prepare_base", fail)
        assert run.run(once=True, port=None, cache=tmp_path) == 1
        assert "could not be prepared" in capsys.readouterr().out

    def test_an_interrupt_ends_it_quietly(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        async def interrupted(cache: Path) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()

        monkeypatch.setattr(run, "prepare_base", interrupted)
        assert run.run(once=True, port=None, cache=tmp_path) == run.INTERRUPTED

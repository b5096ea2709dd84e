"""Each step of the demo's way on a fake server: customers, questions, the server's process, the whole run."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.model import CONFIG_FILE, WEIGHTS_FILE
from adapters.store.blobs import BlobStore
from adapters.store.digests import digest_of
from server.demo import process, run
from server.demo.base import BASE_NAME
from server.demo.client import Answer, DemoError, ask, create_customer
from server.settings import Settings
from tests.support.ports import unused

ADAPTERS = run.ADAPTERS
CUSTOMERS = run.CUSTOMERS


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

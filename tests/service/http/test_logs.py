"""Log lines: their form, and what must never be in them."""

from __future__ import annotations

import ast
import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server import logs
from tests.service.http.test_api import CHAT_URL, digest
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.site import ADMIN_KEY, SERVICE_KEY, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

# The test's own clients, which are no part of the server.
CLIENTS = ("httpx", "httpcore", "openai", "asyncio")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """What ``configure`` changes is global, and the other tests capture logs."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {
        name: logger.level
        for name, logger in logging.Logger.manager.loggerDict.items()
        if isinstance(logger, logging.Logger)
    }
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in logging.Logger.manager.loggerDict:
        logging.getLogger(name).setLevel(levels.get(name, logging.NOTSET))


def lines(err: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in err.splitlines()]


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "info")
    logger = logging.getLogger("server.somewhere")
    logger.info("it %s", "happened", extra={"request_id": "r1", "tenant": "acme", "seconds": 0.5})
    logger.debug("too small to be told")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logger.exception("it failed")
    happened, failed = lines(capsys.readouterr().err)
    assert happened.pop("time")
    assert happened == {
        "level": "INFO", "logger": "server.somewhere", "message": "it happened",
        "request_id": "r1", "tenant": "acme", "seconds": 0.5,
    }  # fmt: skip
    assert "ValueError: two" in failed["exc_info"]


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_text_lines_and_levels(capsys: pytest.CaptureFixture[str], level: str) -> None:
    logs.configure("text", level)
    for each in ("debug", "info", "warning", "error"):
        getattr(logging.getLogger("server.x"), each)("said at %s", each)
    logging.getLogger("uvicorn.access").info('"GET /v1/models?secret" 200')
    told = capsys.readouterr().err.splitlines()
    every = ["debug", "info", "warning", "error"]
    expected = every[every.index(level) :]
    assert [line.split("said at ")[1] for line in told] == expected
    assert all(f"{each.upper()} server.x said at" in line for each, line in zip(expected, told, strict=True))


CUT_OFF: dict[str, Callable[[], object]] = {
    "JSON": lambda: json.loads('{"name": "ping", "argum'),
    "Python": lambda: ast.parse("ping(a="),
}


def refused(level: str, read: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Who is heard of those who cannot ``read`` a text."""
    logs.configure("json", level)
    for name in ("vllm.tool_parsers.hermes_tool_parser", "vllm.entrypoints.other"):
        try:
            read()
        except Exception:
            logging.getLogger(name).exception("Error in extracting tool call from response.")
    return [line["logger"] for line in lines(capsys.readouterr().err)]


@pytest.mark.parametrize("what", CUT_OFF)
def test_a_call_that_was_cut_off_is_no_error_of_the_server(
    what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM writes an error with a traceback for each, of which any customer could cause thousands."""
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)  # which goes before ours
    both = ["vllm.tool_parsers.hermes_tool_parser", "vllm.entrypoints.other"]
    assert refused("info", CUT_OFF[what], capsys) == ["vllm.entrypoints.other"]
    assert refused("debug", CUT_OFF[what], capsys) == both
    assert refused("info", lambda: dict[str, str]()["a defect"], capsys) == both
    logging.getLogger(both[0]).error("said without an exception")
    assert [line["logger"] for line in lines(capsys.readouterr().err)] == both[:1]


async def test_no_prompt_answer_or_key_is_ever_logged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logs.configure("json", "debug")
    for client in CLIENTS:
        logging.getLogger(client).setLevel(logging.CRITICAL)
    prompt = "the-prompt-that-nobody-may-see"
    async with fake_site(tmp_path) as site:
        keys = [await site.tenant(who, {"a": tiny.adapter(1)}) for who in ("acme", "zeta")]
        await site.upload("acme", "a", tiny.adapter(2))
        answer = await digest(site, "acme", "a")
        salts = [tenant.cache_salt for tenant in await site.services.tenants.list()]
        bodies: list[dict[str, Any]] = [
            {"max_tokens": 3},
            {"max_tokens": 3, "stream": True},
            {"model": prompt},
            {prompt: 1},
            {"temperature": -1},
            {"messages": prompt},
            {"stop": [prompt], "stream": True},
            {"response_format": {"type": prompt}},
            {"messages": [{"role": "user", "content": prompt * 200 + " word" * 600}]},
        ]
        for key in keys:
            for body in bodies:
                sent = {"messages": [{"role": "user", "content": prompt}], "user": prompt, **body}
                await site.http.post(CHAT_URL, json=sent, headers=bearer(key))
            await site.http.post("/v1/completions", json={"prompt": prompt}, headers=bearer(key))
            await site.http.post(CHAT_URL, content=f'{{"{prompt}"'.encode(), headers=bearer(key))
            await site.http.get(f"/v1/models/{prompt}?key={key}", headers=bearer(key))
        await site.http.post(CHAT_URL, json={}, headers=bearer(prompt))
        await site.http.get("/v1/models", headers={**bearer(SERVICE_KEY), "X-Customer-ID": prompt})
        hanging = asyncio.create_task(site.chat(keys[0], prompt, max_tokens=400))
        await asyncio.sleep(0.05)
        hanging.cancel()
        await asyncio.wait([hanging])
        assert await site.services.dispatcher.wait_until_idle(60)
    told = capfd.readouterr()
    logged = told.err + told.out
    for secret in (prompt, *keys, ADMIN_KEY, SERVICE_KEY, *salts, f"{answer} 1"):
        assert secret not in logged
    access = [line for line in lines(told.err) if line["logger"] == "loraplex.access"]
    ran = [line for line in access if line.get("outcome") == "completed"]
    assert len(ran) >= 4
    assert {(line["tenant"], line["model"]) for line in ran} == {("acme", "a"), ("zeta", "a")}
    assert all(len(line["request_id"]) == 32 for line in access)


async def test_an_access_line_says_where_the_time_went(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logs.configure("json", "info")
    for client in CLIENTS:
        logging.getLogger(client).setLevel(logging.CRITICAL)
    engine = FakeEngine(tiny.base(), gpu_slots=1, host_slots=1, times=Times(stage=0.05, activate=0.02))
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    async with fake_site(tmp_path, engine, gpu_slots=1, host_slots=1) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1), "b": tiny.adapter(2)})
        headers = {**bearer(key), "X-Request-Id": "mine", "traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
        for model in ("a", "a"):
            body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
            answer = await site.http.post(CHAT_URL, json=body, headers=headers)
        await site.http.post(CHAT_URL, json={**body, "model": "nobody"}, headers=headers)
        for path in ("/health", "/ready", "/metrics"):
            assert (await site.http.get(path)).status_code == 200
        found = (await site.admin.get("/admin/v1/requests")).json()["data"]
    given = answer.headers["traceparent"].split("-")
    assert (given[1], given[3]) == (trace, "01")
    assert given[2] != "00f067aa0ba902b7"
    access = [line for line in lines(capfd.readouterr().err) if line["logger"] == "loraplex.access"]
    assert not [line for line in access if line["message"].split()[1] in ("/health", "/ready", "/metrics")]
    cold, warm, refused = [line for line in access if line.get("client_request_id") == "mine"]
    for line in (cold, warm):
        assert (line["tenant"], line["adapter"], line["version"]) == ("acme", "a", 1)
        assert (line["trace_id"], line["status"], line["output_tokens"]) == (trace, 200, 2)
        assert 0 <= line["queue_seconds"] < line["first_token_seconds"] <= line["seconds"]
    assert (cold["cold"], warm["cold"], warm["load_seconds"]) == (True, False, 0)
    assert 0.07 <= cold["load_seconds"] <= cold["queue_seconds"]
    assert (refused["code"], refused["tenant"], refused["status"]) == ("model_not_found", "acme", 404)
    rows = {row["request_id"]: row for row in found}
    for line in (cold, warm):
        row = rows[line["request_id"]]
        same = ("queue_seconds", "load_seconds", "first_token_seconds", "output_tokens", "cold", "version")
        assert {name: row[name] for name in same} == {name: line[name] for name in same}
    assert rows[refused["request_id"]]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (f"00-{'a' * 32}-{'b' * 16}-01", True),
        (f"cc-{'a' * 32}-{'b' * 16}-01-what-comes-later", True),
        (None, False),
        ("nonsense", False),
        (f"00-{'0' * 32}-{'b' * 16}-01", False),
        (f"00-{'a' * 32}-{'0' * 16}-01", False),
        (f"00-{'A' * 32}-{'b' * 16}-01", False),
        (f"00-{'a' * 32}-{'b' * 16}-01-more", False),
        (f"ff-{'a' * 32}-{'b' * 16}-01", False),
        (f"00-{'a' * 32}-{'b' * 16}-01" + "x" * 1000, False),
    ],
)
def test_a_trace_is_gone_on_with_or_begun(given: str | None, kept: bool) -> None:
    version, trace, span, flags = logs.traceparent(given).split("-")
    assert (version, len(trace), len(span)) == ("00", 32, 16)
    assert (trace == "a" * 32) is kept
    assert span != "b" * 16
    assert flags == ("01" if kept else "00")


def test_lines_of_a_request_have_its_id(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "info")
    token = logs.REQUEST.set(logs.RequestIds("r1"))
    logging.getLogger("server.x").warning("something about it")
    logs.REQUEST.reset(token)
    logging.getLogger("server.x").warning("something else")
    mine, other = lines(capsys.readouterr().err)
    assert mine["request_id"] == "r1"
    assert "request_id" not in other


def test_processes_of_the_engine_write_the_same_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM does it in each of them: by the file that the environment names."""
    for name in ("VLLM_LOGGING_CONFIG_PATH", "VLLM_LOGGING_LEVEL"):  # the engine's tests may have set it
        monkeypatch.delenv(name, raising=False)
    logs.configure_children("json", "info")
    script = (
        "import json, logging, logging.config, os\n"
        "logging.config.dictConfig(json.load(open(os.environ['VLLM_LOGGING_CONFIG_PATH'])))\n"
        "logging.getLogger('vllm.v1.engine').info('loaded in %d s', 3)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    monkeypatch.delenv("VLLM_LOGGING_CONFIG_PATH")
    (line,) = lines(done.stderr)
    assert (line["level"], line["logger"], line["message"]) == ("INFO", "vllm.v1.engine", "loaded in 3 s")

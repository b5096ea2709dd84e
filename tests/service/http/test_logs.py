"""Log lines: their form, and what must never be in them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server import logs
from tests.service.http.test_api import CHAT_URL, digest
from tests.support import tiny
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
        assert await site.services.dispatcher.wait_until_idle(10)
    told = capfd.readouterr()
    logged = told.err + told.out
    for secret in (prompt, *keys, ADMIN_KEY, SERVICE_KEY, *salts, f"{answer} 1"):
        assert secret not in logged
    access = [line for line in lines(told.err) if line["logger"] == "loraplex.access"]
    ran = [line for line in access if line.get("outcome") == "completed"]
    assert len(ran) >= 4
    assert {(line["tenant"], line["model"]) for line in ran} == {("acme", "a"), ("zeta", "a")}
    assert all(len(line["request_id"]) == 32 for line in access)

"""The demo, top to bottom: one small model, three customers, three voices.

base model ready -> server up -> customers, keys and adapters in -> one question to all -> answers
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from adapters.model import CONFIG_FILE
from server.demo.base import BASE_NAME, CHECKOUT, base_folder, cache_folder, is_prepared
from server.demo.client import Answer, DemoError, ask, create_customer
from server.demo.process import free_port, running, tail, wait_until_ready

CUSTOMERS = ("acme", "bluebird", "corvus")
ADAPTER = "support"  # every customer's own name for their own adapter
ADAPTERS = CHECKOUT / "config" / "demo"
QUESTION = "How do I learn to play the guitar?"
ANOTHER_QUESTION = "Why is the sky blue?"
INTERRUPTED = 130  # a shell's status for a program ended by Ctrl-C

console = Console()


def run(*, once: bool, port: int | None, cache: Path | None) -> int:
    """Runs the demo; returns the exit status.

    With ``once`` it ends after the answers, with 0 only if all of them differ; else it serves until
    SIGINT or SIGTERM, which is a good end too. ``port`` is a wish (8000 if None); ``cache`` keeps the
    base model and the demo's data.
    """
    return interruptible(_demo(once, port or 8000, (cache or cache_folder()).absolute()))


def interruptible(demo: Coroutine[Any, Any, int]) -> int:
    """Runs ``demo`` until its end or a signal; returns the exit status."""
    try:
        return asyncio.run(_interruptible(demo))
    except DemoError as exc:
        console.print(Text(f"The demo stops here: {exc}", style="red"))
        return 1


async def _interruptible(work: Coroutine[Any, Any, int]) -> int:
    demo = asyncio.ensure_future(work)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, demo.cancel)
    try:
        return await demo
    except asyncio.CancelledError:
        console.print("Stopped.")
        return INTERRUPTED


async def _demo(once: bool, wanted_port: int, cache: Path) -> int:
    await prepare_base(cache)
    port = free_port(wanted_port)
    if port != wanted_port:
        console.print(f"Port {wanted_port} is taken; using {port} instead.")
    data = cache / "demo-data"
    data.mkdir(parents=True, exist_ok=True)
    log = data / "server.log"
    admin_key = secrets.token_urlsafe(32)
    command = [sys.executable, "-m", "server", "serve"]
    url = f"http://127.0.0.1:{port}"
    async with (
        running(command, environment(base_folder(cache), data, port, admin_key), log) as server,
        httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client,
    ):
        with step("Starting the server and loading the model, once for all customers"):
            await wait_until_ready(server, client, log)
        with step("Creating three customers and uploading an adapter for each"):
            keys = await _create_customers(url, admin_key)
        with step("Asking all of them the same question at once"):
            answers = await _ask_everyone(client, keys)
        console.print(answer_table(answers))
        _print_how_to_ask(url, keys[CUSTOMERS[0]])
        if once:
            return verdict(answers)
        console.print("\nThe console, signed in as the operator (this address works once, for ten minutes):")
        console.print(url + await console_path(client, admin_key), soft_wrap=True)
        console.print(f"\nServing on {url} until Ctrl-C. The log: {log}", soft_wrap=True)
        try:
            status = await server.wait()
        except asyncio.CancelledError:
            console.print("Stopping the server; a second Ctrl-C kills it.")
            return 0
    raise DemoError(f"the server ended with status {status}:\n{tail(log)}")


async def prepare_base(cache: Path) -> None:
    """In a process of its own, which gives the memory of a whole training library back."""
    if is_prepared(cache):
        return
    with step(f"Preparing the base model {BASE_NAME}, the first time only"):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "server.demo.base", str(cache)),
            cwd=CHECKOUT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.terminate()
    if process.returncode:
        lines = output.decode(errors="replace").strip().splitlines()
        raise DemoError("the base model could not be prepared:\n" + "\n".join(lines[-5:]))


def environment(base: Path, data: Path, port: int, admin_key: str) -> dict[str, str]:
    """The server's environment. Loraplex settings of the caller's own shell stay out of the demo."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LORAPLEX_")}
    settings = {
        "MODEL": str(base),
        "SERVED_MODEL_NAME": BASE_NAME,
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "DATA_DIR": str(data),
        "ADMIN_KEY": admin_key,
        "GPU_SLOTS": "4",
        "HOST_SLOTS": "8",
        "MAX_LORA_RANK": "16",
        "MAX_MODEL_LEN": "2048",
        "ENGINE_ARGS": json.dumps({"max_num_seqs": 16}),
        "LOG_FORMAT": "text",
    }
    return inherited | {
        **{f"LORAPLEX_{name}": value for name, value in settings.items()},
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }


async def _create_customers(url: str, admin_key: str) -> dict[str, str]:
    """Customer -> key."""
    headers = {"Authorization": f"Bearer {admin_key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120, trust_env=False) as admin:
        return {name: await create_customer(admin, name, ADAPTER, ADAPTERS / name) for name in CUSTOMERS}


async def console_path(client: httpx.AsyncClient, key: str) -> str:
    """Where a browser is signed in to the console with ``key``, once."""
    made = await client.post("/console/ticket", headers={"Authorization": f"Bearer {key}"})
    return str(made.raise_for_status().json()["path"])


async def _ask_everyone(client: httpx.AsyncClient, keys: dict[str, str]) -> dict[str, Answer]:
    """Customer -> answer of their adapter, and the base model's name -> its own answer."""
    questions = [ask(client, keys[name], ADAPTER, QUESTION) for name in CUSTOMERS]
    questions.append(ask(client, keys[CUSTOMERS[0]], BASE_NAME, QUESTION))
    return dict(zip((*CUSTOMERS, BASE_NAME), await asyncio.gather(*questions), strict=True))


def verdict(answers: dict[str, Answer]) -> int:
    """0 if nobody is silent and no two say the same, else 1."""
    texts = [answer.text for answer in answers.values()]
    if all(texts) and len(set(texts)) == len(texts):
        return 0
    console.print("[red]The answers do not all differ: an adapter was not applied.[/red]")
    return 1


def answer_table(answers: dict[str, Answer]) -> Table:
    table = Table(title=f"“{QUESTION}”", title_justify="left", show_lines=True)
    table.add_column("customer", no_wrap=True)
    table.add_column("model", no_wrap=True)
    table.add_column("answer", ratio=1)
    table.add_column("first token", justify="right", no_wrap=True)
    table.add_column("total", justify="right", no_wrap=True)
    for name, answer in answers.items():
        of_customer = name in CUSTOMERS
        table.add_row(
            name if of_customer else "",
            f"{ADAPTER} (rank {_rank(name)})" if of_customer else "the base model",
            Text(answer.text),
            f"{answer.first_token:.2f} s",
            f"{answer.total:.2f} s",
        )
    return table


def _rank(customer: str) -> int:
    rank: int = json.loads((ADAPTERS / customer / CONFIG_FILE).read_text(encoding="utf-8"))["r"]
    return rank


def _print_how_to_ask(url: str, key: str) -> None:
    messages = json.dumps([{"role": "user", "content": ANOTHER_QUESTION}])
    body = f'{{"model": "{ADAPTER}", "temperature": 0, "messages": {messages}}}'
    curl = f"""
Ask {CUSTOMERS[0]}'s adapter with curl:

curl {url}/v1/chat/completions -H "Authorization: Bearer {key}" \\
  -H "Content-Type: application/json" -d '{body}'
"""
    sdk = f"""
Or with the OpenAI SDK:

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="{key}")
answer = client.chat.completions.create(model="{ADAPTER}", temperature=0, messages={messages})
print(answer.choices[0].message.content)
"""
    for text in (curl, sdk):
        console.out(text.rstrip(), highlight=False)


@contextmanager
def step(text: str) -> Iterator[None]:
    """Shows ``text`` with the seconds running, and leaves a line with the seconds it took."""
    started = time.monotonic()
    if console.is_terminal:
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            progress.add_task(text, total=None)
            yield
    else:
        console.print(f"{text} …")
        yield
    console.print(f"{text}: {time.monotonic() - started:.1f} s")

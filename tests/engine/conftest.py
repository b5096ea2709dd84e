"""The real engine, started once per run, and adapters made for it by PEFT."""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from server.app import create_app
from server.demo.base import cache_folder, prepare
from server.engine.engine import Engine
from tests.engine.reference import Reference
from tests.support.shallow import make_shallow
from tests.support.site import Site, engine_settings, serving

# What the memory of the settings below comes to.
GPU_SLOTS = 8
HOST_SLOTS = 16


@pytest.fixture(scope="session")
def whole_base_dir() -> Path:
    """The demo's base as it is."""
    return prepare(cache_folder())


@pytest.fixture(scope="session")
def base_dir(whole_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shallow(whole_base_dir, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def whole_reference(whole_base_dir: Path) -> Reference:
    return Reference(whole_base_dir)


@pytest.fixture(scope="session")
def reference(base_dir: Path) -> Reference:
    return Reference(base_dir)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def site(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    settings = engine_settings(
        base_dir,
        tmp_path_factory.mktemp("data"),
        adapter_gpu_memory="320MiB",
        adapter_host_memory="640MiB",
        max_lora_rank=64,
        max_model_len=1024,
        rollout_key="a key of the tests that is long enough",
        engine_args={"dtype": "float32", "max_num_seqs": 16},
    )
    async with serving(create_app(settings)) as site:
        yield site


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def quiet(site: Site) -> AsyncIterator[Engine]:
    """The engine while the dispatcher has given everything back and asks for nothing."""
    engine, dispatcher = site.services.engine, site.services.dispatcher
    for version in list(dispatcher._versions.values()):
        dispatcher.retire(version)
    async with asyncio.timeout(240):
        while (report := await engine.report()).host or report.staging:
            await asyncio.sleep(0.05)
    await dispatcher.stop()
    yield engine
    dispatcher.start()

"""A tiny random Llama, adapters that PEFT made for it, and the whole app around a ``FakeEngine`` of it."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.model import BaseModel, ModuleShape
from server.app import create_app
from server.engine.calls import EngineDied
from server.settings import Settings
from tests.support.databases import copy_tables
from tests.support.fakes import FakeEngine
from tests.support.site import ADMIN_KEY, SERVICE_KEY, Site, serving

NAME = "tiny-llama"
_folder = Path(tempfile.mkdtemp(prefix="loraplex-tiny-"))
_process = os.getpid()


@atexit.register
def _clean_up() -> None:
    if os.getpid() == _process:  # not one that was forked from it
        shutil.rmtree(_folder)


@functools.cache
def _model() -> PeftModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


@functools.cache
def base() -> BaseModel:
    bare = _model().get_base_model()
    modules = {
        name.replace(".base_layer", ""): ModuleShape(layer.in_features, layer.out_features)
        for name, layer in bare.named_modules()
        if isinstance(layer, torch.nn.Linear) and "lora_" not in name and name != "lm_head"
    }
    return BaseModel(name=NAME, modules=modules, max_lora_rank=8)


@functools.cache
def adapter(seed: int) -> Path:
    """A folder with a random adapter; another one for every seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in _model().named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    folder = _folder / str(os.getpid()) / str(seed)
    _model().save_pretrained(folder)
    return folder


class _Given(Settings):
    """Only what it is given: to look for each setting elsewhere takes longer than most tests."""

    @classmethod
    def settings_customise_sources(
        cls, _: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **others: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def settings(folder: Path, **changes: Any) -> Settings:
    fields: dict[str, Any] = {
        "model": f"/models/{NAME}",
        "data_dir": folder,
        "admin_key": ADMIN_KEY,
        "service_key": SERVICE_KEY,
        "gpu_slots": 2,
        "host_slots": 4,
        "max_lora_rank": 8,
        "slot_patience": 0.1,
        # A machine that is busy, or stands still, is no fault of a database, a client or a queue.
        "database_timeout": 60.0,
        "client_timeout": 600.0,
        "queue_timeout": 600.0,
        "sse_keepalive": 600.0,
    }
    return _Given(**(fields | changes))


@asynccontextmanager
async def fake_site(
    folder: Path,
    engine: FakeEngine | None = None,
    *,
    on_death: Callable[[EngineDied], None] = lambda _: None,
    **changes: Any,
) -> AsyncIterator[Site]:
    """The app on ``engine``; fails at the end if the engine was misused or the plan does not add up."""
    chosen = settings(folder, **changes)
    if "database_url" not in changes:
        await copy_tables(folder / "loraplex.db")
    assert isinstance(chosen.gpu_slots, int)
    assert isinstance(chosen.host_slots, int)
    fake = engine or FakeEngine(base(), gpu_slots=chosen.gpu_slots, host_slots=chosen.host_slots)

    async def start(_: Settings) -> FakeEngine:
        return fake

    app = create_app(chosen, start_engine=start, on_death=on_death)  # type: ignore[arg-type]
    async with serving(app) as site:
        yield site
        site.services.dispatcher._plan.check()
    assert fake.stopped
    assert fake.violations == []

"""The probe on the real engine: what it sees of an adapter, and that what it runs harms nobody."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from safetensors.torch import load_file, save_file

from adapters.model import CONFIG_FILE, PROBES_FILE, WEIGHTS_FILE
from server.cli import offline
from tests.engine.reference import ATTENTION, MLP, Reference, Spec
from tests.support.site import Site

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

URL = "/admin/v1/tenants/prober/adapters/{name}/versions"


@pytest.fixture(scope="module")
def made(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe") / "effect"
    return reference.make(Spec(seed=71, rank=8, targets=ATTENTION + MLP), folder)


@pytest_asyncio.fixture(scope="module", loop_scope="session", autouse=True)
async def tenant(site: Site) -> str:
    return await site.tenant("prober")


def scaled(made: Path, folder: Path, factor: float, *, side: str = "lora_B") -> Path:
    shutil.copytree(made, folder)
    tensors = load_file(made / WEIGHTS_FILE)
    save_file({n: t * factor if side in n else t for n, t in tensors.items()}, folder / WEIGHTS_FILE)
    return folder


async def upload(
    site: Site, name: str, folder: Path, query: str = "", *, probes: Any = None
) -> tuple[int, dict[str, Any]]:
    files = {n: (folder / n).read_bytes() for n in (CONFIG_FILE, WEIGHTS_FILE)}
    if probes is not None:
        files[PROBES_FILE] = json.dumps(probes).encode()
    answer = await site.admin.post(URL.format(name=name) + query, files=files)
    return answer.status_code, answer.json()


async def test_an_adapter_shows_what_it_changes(site: Site, made: Path, tmp_path: Path) -> None:
    changes = []
    for name, factor in (("strong", 1.0), ("weak", 0.01)):
        status, body = await upload(site, name, scaled(made, tmp_path / name, factor))
        assert status == 201, body
        probe = body["report"]["probe"]
        assert probe["effect"] is True
        assert (probe["dtype"], len(probe["base"])) == ("float32", 64)
        assert probe["engine"].startswith("vllm 0.")
        assert 0 <= probe["noise"]["log_prob"] < 1e-3
        changes.append((probe["log_prob"], probe["kl"]))
        shown = (await site.admin.get(f"/admin/v1/tenants/prober/adapters/{name}")).json()
        assert shown["tier"] == "gpu"
    print("log-probability and KL, strong and weak:", changes)
    assert changes[0][0] > 0.5
    assert changes[0][1] > 0.1
    assert 1e-3 < changes[1][0] < changes[0][0]
    assert 0 < changes[1][1] < changes[0][1]


async def test_one_that_float32_swallows_is_refused_and_may_be_forced(
    site: Site, made: Path, tmp_path: Path
) -> None:
    tiny = scaled(made, tmp_path / "tiny", 1e-12)
    status, body = await upload(site, "tiny", tiny)
    assert (status, body["error"]["code"]) == (422, "adapter_no_effect"), body
    assert "norm" in body["error"]["message"]
    status, body = await upload(site, "tiny", tiny, "?allow_no_effect=true")
    assert status == 201, body
    probe = body["report"]["probe"]
    assert (probe["effect"], probe["no_effect_allowed"]) == (False, True)
    assert probe["log_prob"] <= 1e-4


async def test_an_untrained_one_may_be_forced_too(site: Site, made: Path, tmp_path: Path) -> None:
    untrained = scaled(made, tmp_path / "untrained", 0.0)
    status, body = await upload(site, "untrained", untrained)
    assert (status, body["error"]["code"]) == (422, "adapter_no_effect")
    status, body = await upload(site, "untrained", untrained, "?allow_no_effect=true")
    assert status == 201, body
    assert body["report"]["probe"]["effect"] is False


async def test_the_engine_agrees_with_what_peft_computed(
    site: Site, base_dir: Path, made: Path, reference: Reference, tmp_path: Path
) -> None:
    out = tmp_path / PROBES_FILE
    assert (
        await asyncio.to_thread(offline.make_probes, base_dir, made, out, prompts=[], tolerance=0.01)
        == offline.OK
    )
    golden = json.loads(out.read_text())
    for probe in golden["probes"]:
        assert probe["prompt"] == reference.tokenizer(probe["text"])["input_ids"]
    golden["probes"][0]["prompt"] = golden["probes"][0]["text"]  # the engine's tokenizer is the same
    status, body = await upload(site, "golden", made, probes=golden)
    assert status == 201, body
    found = body["report"]["golden"]
    print("largest difference from PEFT:", found["largest_difference"])
    assert found["matches"] is True
    assert found["largest_difference"] < 0.01
    verified = await site.admin.post("/admin/v1/tenants/prober/adapters/golden/verify")
    assert verified.json() == {"adapter": "golden", "version": 1, **found} | {
        "largest_difference": pytest.approx(found["largest_difference"], abs=1e-3),
        "worst_prompt": verified.json()["worst_prompt"],
    }
    other = scaled(made, tmp_path / "other", 0.5)
    status, body = await upload(site, "golden", other, probes=golden)
    assert (status, body["error"]["code"]) == (422, "probe_mismatch"), body
    foreign = {"probes": [{"prompt": [1, 10_000_000], "log_probs": [-1.0]}]}
    status, body = await upload(site, "golden", made, probes=foreign)
    assert (status, body["error"]["code"]) == (422, "probes_invalid"), body
    assert (await site.http.get("/ready")).status_code == 200


async def test_answers_that_are_not_numbers_harm_nobody(
    site: Site, made: Path, tenant: str, tmp_path: Path
) -> None:
    """The weights are finite, what the model makes of them is not, and it passes through the KV cache."""
    await upload(site, "control", made)
    before = await ask_several(site, tenant)
    for i in range(3):
        folder = scaled(made, tmp_path / f"large{i}", 1e19 * (i + 1))
        folder = scaled(folder, tmp_path / f"larger{i}", 1e15, side="lora_A")
        status, body = await upload(site, "large", folder)
        assert (status, body["error"]["code"]) == (422, "adapter_implausible"), body
        status, body = await upload(site, "large", folder, "?allow_implausible=true")
        assert (status, body["error"]["code"]) == (422, "weights_not_finite"), body
        assert "not numbers" in body["error"]["message"]
        assert await ask_several(site, tenant) == before
    assert (await site.http.get("/ready")).status_code == 200


async def ask_several(site: Site, key: str) -> list[str]:
    """Answers of different lengths, so that blocks that were just in use are used anew and not filled."""

    async def ask(model: str, words: int) -> str:
        made = await site.chat(
            key,
            "Count: " + "one " * words,
            model=model,
            max_tokens=12,
            temperature=0,
            logprobs=True,
        )
        assert made.status_code == 200, made.text
        (choice,) = made.json()["choices"]
        assert all(math.isfinite(token["logprob"]) for token in choice["logprobs"]["content"])
        return str(choice["message"]["content"])

    base = site.services.engine.base.name
    return await asyncio.gather(
        *(ask(model, words) for model in (base, "control") for words in range(1, 30, 7))
    )

"""Log-probabilities of prompts, where adapters have the head, by both of vLLM's runners."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from adapters.inspection.admit import admit
from adapters.inspection.base_model import read_base
from adapters.worker.prompts import PromptHeads
from tests.support import kernels_in_torch
from tests.support.vllm_models import activate, loaded
from tests.support.vocabulary import make_llama, train

# The batch: request -> its adapter, 0 for none, and its rows of the step.
ADAPTERS = {"adapted": 1, "bare": 0, "another": 1}
STARTS = (0, 4, 9, 12)
PROMPTS = {"adapted": [3, 200, 3, 17], "bare": [255, 1, 9, 17, 80], "another": [6, 90, 41]}
HIDDEN = torch.randn((STARTS[-1] + 4, 128), generator=torch.Generator().manual_seed(5))  # padded


class First:
    """What the first version of vLLM's runner uses of itself."""

    def __init__(self, model: Any) -> None:
        from vllm.v1.sample.sampler import Sampler
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        self.model, self.device, self.sampler = model, torch.device("cpu"), Sampler()
        self.model_config = SimpleNamespace(logprobs_mode="raw_logprobs")
        self.num_prompt_logprobs = dict.fromkeys(PROMPTS, 0)
        self.requests = {
            name: SimpleNamespace(
                prompt_token_ids=ids, num_computed_tokens=0, in_progress_prompt_logprobs_cpu=None
            )
            for name, ids in PROMPTS.items()
        }
        self.input_batch = SimpleNamespace(req_id_to_index={name: i for i, name in enumerate(PROMPTS)})
        self.query_start_loc = SimpleNamespace(np=np.array(STARTS))
        self._get_prompt_logprobs_dict = MethodType(GPUModelRunner._get_prompt_logprobs_dict, self)

    def _sync_device(self) -> None:
        pass

    def of_prompts(self) -> dict[str, list[float]]:
        counts = {name: len(ids) for name, ids in PROMPTS.items()}
        found = self._get_prompt_logprobs_dict(HIDDEN, counts)
        return {name: one.logprobs[:, 0].tolist() for name, one in found.items()}


class Second:
    """What the second version has: all rows of the step at once, in pieces that end within a prompt."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.prompt_logprobs_worker = SimpleNamespace(
            compute_prompt_logprobs=self._compute, compute_prompt_token_id_logprobs=self._compute
        )

    def _compute(self, logits_fn: Any, hidden_states: torch.Tensor, starts: tuple[int, ...]) -> Any:
        states = hidden_states[: starts[-1]]
        logits = torch.cat([logits_fn(states[at : at + 5]) for at in range(0, len(states), 5)])
        ids = torch.tensor([one for prompt in PROMPTS.values() for one in [*prompt[1:], 0]])
        return torch.log_softmax(logits, -1).gather(1, ids[:, None])[:, 0]

    def of_prompts(self) -> dict[str, list[float]]:
        worker = self.prompt_logprobs_worker
        found = worker.compute_prompt_logprobs(self.model.compute_logits, HIDDEN, STARTS)
        again = worker.compute_prompt_token_id_logprobs(self.model.compute_logits, HIDDEN, STARTS)
        assert torch.equal(found, again)
        rows = zip(PROMPTS, pairwise(STARTS), strict=True)
        return {name: found[first : last - 1].tolist() for name, (first, last) in rows}


@pytest.fixture(params=["cpu", "gpu"])
def tables(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """Of a Llama with an adapter on its head as number 1, by the kernels of either device."""
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    made = make_llama(tmp_path / "base", tied=False)
    train(made, ("lm_head",), tmp_path / "trained")
    (tmp_path / "admitted").mkdir()
    admit(tmp_path / "trained", read_base(made.folder, max_lora_rank=64), into=tmp_path / "admitted")
    with (
        pytest.MonkeyPatch.context() as patch,
        torch.inference_mode(),
        loaded(made.folder, "float32", tmp_path) as tables,
    ):
        if request.param == "gpu":
            kernels_in_torch.install(patch)
            wrapper = PunicaWrapperGPU(64, 8, "cpu", lora_config=tables.lora_config)
            tables.punica_wrapper_mapping = dict.fromkeys(tables.punica_wrapper_mapping, wrapper)
            for layer in tables.modules.values():
                layer.set_mapping(wrapper)
        activate(tables, tmp_path / "admitted")
        yield tables


@pytest.mark.parametrize("version", [First, Second])
def test_a_prompt_has_the_head_of_its_own_adapter(version: Any, tables: Any) -> None:
    from vllm.lora.layers import LoRAMapping

    rows = [
        number
        for number, (a, b) in zip(ADAPTERS.values(), pairwise(STARTS), strict=True)
        for _ in range(b - a)
    ]

    def map_rows(sampled: list[int]) -> None:
        tables.set_adapter_mapping(LoRAMapping(tuple(rows), tuple(sampled), is_prefill=True))

    map_rows(rows)  # one sampled row for each token: vLLM's own products are right then
    expected = torch.log_softmax(tables.model.compute_logits(HIDDEN[: STARTS[-1]]), -1)
    map_rows(list(ADAPTERS.values()))
    sampled = tables.model.compute_logits(HIDDEN[[3, 8, 11]])

    runner = version(tables.model)
    PromptHeads(runner, tables)
    found = runner.of_prompts()

    for name, first in zip(PROMPTS, STARTS, strict=False):
        wanted = [float(expected[first + i, one]) for i, one in enumerate(PROMPTS[name][1:])]
        assert found[name] == pytest.approx(wanted, abs=1e-5), name
    assert torch.equal(tables.model.compute_logits(HIDDEN[[3, 8, 11]]), sampled)

"""What is added to vLLM's outputs before its front end has them."""

from __future__ import annotations

from typing import Any

import pytest

PROMPT = [5, 17]


def output(answer: int, token: int, prompt_logprobs: Any) -> Any:
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput, RequestOutput

    told = CompletionOutput(answer, "x", [token], None, [{token: Logprob(-1.0)}])
    return RequestOutput("id", "ab", PROMPT, prompt_logprobs, [told], finished=False)


@pytest.mark.asyncio
async def test_answers_that_begin_at_different_steps_all_have_the_prompts_log_probabilities() -> None:
    """As where the prompt is read in pieces, and a client of several answers is slower than the engine."""
    from vllm.logprobs import Logprob
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.output_processor import RequestOutputCollector

    from server.engine.metered import with_prompt_logprobs

    whole = [None, {17: Logprob(-2.0)}]
    queue = RequestOutputCollector(RequestOutputKind.DELTA, "id")

    async def stream() -> Any:
        queue.put(output(0, 1, whole))
        yield await queue.get()
        queue.put(output(0, 2, []))  # vLLM puts them together, as of the first of both
        queue.put(output(1, 3, whole))
        yield await queue.get()
        queue.put(output(1, 4, []))
        yield await queue.get()

    found = [one async for one in with_prompt_logprobs(stream())]
    assert [[answer.token_ids for answer in one.outputs] for one in found] == [[[1]], [[2], [3]], [[4]]]
    assert [one.prompt_logprobs for one in found] == [whole] * 3

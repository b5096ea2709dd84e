"""What the engine's core is asked so that an answer goes on as if it had never stopped.

The core sees one prompt: that of the request, and the tokens of the answer so far. vLLM's output processor,
which keeps text, stop strings, log-probabilities and usage, sees one answer. It has seen the tokens already
where the same process goes on, and is shown them again where the answer began in another one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists


def can_resume(sent: Any) -> bool:
    """Whether a request that is begun anew from its prompt and its answer so far goes on as it would have.

    Not so where the core keeps more than tokens: a grammar's state, a random generator's, or counts of the
    answer's own tokens, which would then be the prompt's.
    """
    params = sent.sampling_params
    return (
        params is not None
        and params.n == 1
        and params.structured_outputs is None
        and params.presence_penalty == params.frequency_penalty == 0
        and (params.seed is None or params.sampling_type == params.sampling_type.GREEDY)
        and getattr(params, "thinking_token_budget", None) is None
        and getattr(params, "repetition_detection", None) is None
        and not params.bad_words
        and not params.extra_args
        and sent.prompt_embeds is None
    )


def possible(sent: Any) -> bool:
    """Whether another process can go on with a request from its prompt and its tokens so far.

    As ``can_resume``; and log-probabilities of the prompt, which come once, are not among what is handed on.
    """
    return can_resume(sent) and sent.sampling_params.prompt_logprobs is None


def output_of(sent: Any, said: Sequence[int], cached: int) -> Any:
    """``said`` as if the core had just produced it for the request ``sent``.

    Log-probabilities, where they were asked for, are 0: what is made of this output has been handed on
    already and is thrown away.
    """
    wanted = sent.sampling_params.logprobs
    logprobs = None
    if wanted is not None:
        columns = 1 + max(0, wanted)
        tokens = np.repeat(np.asarray(said, dtype=np.int32)[:, None], columns, axis=1)
        ranks = np.ones(len(said), dtype=np.int32)
        logprobs = LogprobsLists(tokens, np.zeros(tokens.shape, dtype=np.float32), ranks)
    return EngineCoreOutput(
        request_id=sent.request_id,
        new_token_ids=list(said),
        new_logprobs=logprobs,
        prefill_stats=PrefillStats(num_cached_tokens=cached),
    )


def continuation(sent: Any, state: Any, lora_request: Any) -> Any:
    """``sent`` with what was answered so far as part of its prompt."""
    said = list(state.detokenizer.output_token_ids)
    params = sent.sampling_params.clone()
    params.max_tokens -= len(said)
    params.min_tokens = max(0, params.min_tokens - len(said))
    if said:  # log-probabilities of the prompt came with the first token
        params.prompt_logprobs = None
        params.skip_reading_prefix_cache = False
    more = copy.copy(sent)
    more.prompt_token_ids = [*sent.prompt_token_ids, *said]
    more.sampling_params = params
    more.lora_request = lora_request
    return more

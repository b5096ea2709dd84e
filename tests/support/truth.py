"""What a model answers to one prompt: by transformers and PEFT, and by a server.

Its words are those of the tiny bases of ``trainer``, one for each id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapters.inspection.logprobs import PROMPTS

VOCABULARY = 256
PROBED = tuple(dict.fromkeys(" ".join(PROMPTS).split()))
PROMPT = (5, 17, 3, 88, 41, 200, 9)
LENGTH = 16


@dataclass(frozen=True)
class Truth:
    """The greedy answer to PROMPT: LENGTH ids and their log-probabilities; and those of PROMPT's own tokens,
    without the first one."""

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    of_prompt: tuple[float, ...]

    def apart(self, other: Truth) -> float:
        """The largest difference between their log-probabilities."""
        mine, others = self.log_probs + self.of_prompt, other.log_probs + other.of_prompt
        return max(abs(a - b) for a, b in zip(mine, others, strict=True))


def echoed(model: str) -> dict[str, Any]:
    """A request to ``model`` for what ``answer`` finds."""
    return {
        "model": model,
        "prompt": PROMPT,
        "echo": True,
        "max_tokens": LENGTH,
        "temperature": 0,
        "logprobs": 1,
    }


def heard(said: Mapping[str, Any]) -> Truth:
    """The same out of the reply to ``echoed``."""
    found = said["choices"][0]["logprobs"]
    ids = tuple(map(token, found["tokens"][len(PROMPT) :]))
    first, *of_prompt = found["token_logprobs"][: len(PROMPT)]
    assert first is None
    return Truth(ids, tuple(found["token_logprobs"][len(PROMPT) :]), tuple(of_prompt))


def answer(model: Any) -> Truth:
    ids, log_probs = list(PROMPT), []
    with torch.inference_mode():
        read = torch.log_softmax(model.eval()(torch.tensor([PROMPT])).logits[0], dim=-1)
        of_prompt = read[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0].tolist()
        for _ in range(LENGTH):
            best = torch.log_softmax(model.eval()(torch.tensor([ids])).logits[0, -1], dim=-1).max(dim=-1)
            ids.append(int(best.indices))
            log_probs.append(float(best.values))
    return Truth(tuple(ids[len(PROMPT) :]), tuple(log_probs), tuple(of_prompt))


def word(token: int) -> str:
    """Those of the server's probes first, so that they are not all the same to a model."""
    return PROBED[token] if token < len(PROBED) else f"w{token}"


_TOKENS = {word(token): token for token in range(VOCABULARY)}


def token(word: str) -> int:
    return _TOKENS[word.strip()]


def words(ids: Sequence[int]) -> tuple[str, ...]:
    return tuple(word(i) for i in ids)

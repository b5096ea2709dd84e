"""What two answers to a replayed prompt come to, and which prompts are replayed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from server.inference.dialects.registry import DIALECTS
from server.rollouts.replay import MOST_DRIFT, Said, compared, said_of
from server.rollouts.sampler import MOST_BYTES, Cipher, prompt_of

SURE = {"token_id:1": math.log(0.9), "token_id:2": math.log(0.1)}
UNSURE = {"token_id:1": math.log(0.5), "token_id:2": math.log(0.5)}


def test_drift_divergence_and_change() -> None:
    live = Said([1, 1], [math.log(0.9)] * 2, [SURE, SURE])
    assert compared(live, live, live) == {"drift": 0.0, "divergence": 0.0, "changed": 0}
    scored = Said([1, 1], [math.log(0.5)] * 2, [UNSURE, UNSURE])
    found = compared(live, Said([1, 2], [], []), scored)
    assert found["drift"] == pytest.approx(math.log(0.9 / 0.5))
    assert found["divergence"] == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5))
    assert found["changed"] == 1
    never = Said([1, 1], [-9999.0] * 2, [UNSURE, UNSURE])
    assert compared(live, live, never)["drift"] == MOST_DRIFT
    with pytest.raises(ValueError, match="not numbers"):
        compared(live, live, Said([1, 1], [math.nan] * 2, [UNSURE, UNSURE]))


def test_lists_of_a_completion() -> None:
    lists = {
        "tokens": ["token_id:5", "token_id:7"],
        "token_logprobs": [None, -0.5],
        "top_logprobs": [None, SURE],
    }
    said = said_of(lists)
    assert (said.tokens, said.log_probs[1], said.steps) == ([5, 7], -0.5, [{}, SURE])
    assert math.isnan(said.log_probs[0])


CHAT = {"messages": [{"role": "user", "content": "hi"}]}
PARTS: dict[str, Any] = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}
IMAGE: dict[str, Any] = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}


@pytest.mark.parametrize(
    ("dialect", "fields", "kept"),
    [
        ("chat", CHAT | {"temperature": 1, "model": "a", "user": "me"}, CHAT),
        ("chat", PARTS, PARTS),
        ("chat", IMAGE, None),
        ("completion", {"prompt": "hi", "max_tokens": 3}, {"prompt": "hi"}),
        ("completion", {"prompt": ["hi"]}, {"prompt": "hi"}),
        ("completion", {"prompt": [1, 2]}, {"prompt": [1, 2]}),
        ("completion", {"prompt": ["hi", "ho"]}, None),
        ("completion", {"prompt": [[1], [2]]}, None),
        ("completion", {"prompt": "x" * MOST_BYTES}, None),
        ("embedding", {"input": "hi"}, None),
        ("responses", {"input": "hi"}, None),
    ],
)
def test_what_of_a_request_is_kept(dialect: str, fields: dict[str, Any], kept: Any) -> None:
    assert prompt_of(DIALECTS[dialect], fields) == (kept and {"dialect": dialect, "fields": kept})


def test_a_prompt_is_sealed_for_its_rollout_and_its_key() -> None:
    cipher = Cipher("k" * 32)
    sealed = cipher.seal("one", {"fields": "secret"})
    assert b"secret" not in sealed
    assert cipher.seal("one", {"fields": "secret"}) != sealed
    assert cipher.open("one", sealed) == {"fields": "secret"}
    assert cipher.open("two", sealed) is None
    assert cipher.open("one", sealed[:-1] + b"x") is None
    assert Cipher("l" * 32).open("one", sealed) is None
    assert Cipher("l" * 32).name != cipher.name == Cipher("k" * 32).name

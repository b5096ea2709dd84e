"""vLLM's scores of two texts at once, where the base has a head: for every number of labels, and safely.

vLLM makes its ``ServingScores`` where the base itself has one label. Here an adapter with one has a head of
its own on any base, so it is made wherever labels are. Which versions may be asked is for the caller to know.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

logger = logging.getLogger(__name__)


def score_by_heads(state: Any) -> None:
    """Sets ``state.serving_scores``, or leaves None where vLLM cannot put two texts together."""
    if state.serving_scores is None:
        state.serving_scores = _made(state.serving_classification)
    if state.serving_scores is not None:
        _without_types(state.serving_scores.io_processor)


def _made(classification: Any) -> Any:
    """``ServingScores`` beside ``classification``, vLLM's ServingClassification; None with a warning."""
    from vllm.entrypoints.pooling.scoring.serving import ServingScores

    try:
        return ServingScores(
            classification.engine_client,
            classification.models,
            supported_tasks=("classify",),
            request_logger=None,
            chat_template_config=classification.chat_template_config,
        )
    except ValueError as exc:
        logger.warning("/v1/score and /v1/rerank are refused: %s", exc)
        return None


def _without_types(processor: Any) -> None:
    """Leaves out which text a token is of, which many tokenizers say and few models take.

    vLLM hands it to the model's forward pass whatever that takes, and the engine ends there.
    """
    from vllm.model_executor.model_loader import get_model_cls

    if takes_types(get_model_cls(processor.model_config)):
        return
    original = processor.get_score_prompt

    def get_score_prompt(*args: Any, **kwargs: Any) -> Any:
        full, prompt = original(*args, **kwargs)
        prompt.pop("token_type_ids", None)
        return full, prompt

    processor.get_score_prompt = get_score_prompt


def takes_types(model: type) -> bool:
    """Whether the forward pass of a class of vLLM's tells the two texts apart by ``token_type_ids``."""
    return "token_type_ids" in inspect.signature(model.forward).parameters  # type: ignore[attr-defined]

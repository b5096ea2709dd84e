"""``/v1/classify``, vLLM's, where the base model has a head that gives labels or a reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from server.engine.calls import Call
from server.engine.serving import numbers_of
from server.errors import Unavailable
from server.inference.dialects.answers import Classifications
from server.inference.dialects.base import Dialect
from server.inference.dialects.embeddings import INPUT
from server.inference.dialects.schema import BOOL, MODEL, TEXT, object_of


class Classify(Dialect):
    name = "classification"
    place = 6
    path = "/v1/classify"
    operation = "classify"
    example: ClassVar[Mapping[str, Any]] = {"model": "support", "input": ["first text", "second text"]}
    prompt_fields = ("input",)
    numbers_field = "probs"
    first_request: ClassVar[Mapping[str, Any]] = {"input": "Hello"}
    summary = "Labels of texts with their probabilities, where the base model has a head for them"
    answer = Classifications
    accepted = frozenset(
        {
            "model", "add_special_tokens", "input", "truncate_prompt_tokens", "truncation_side",
            "use_activation", "user",
        }
    )  # fmt: skip
    base = "labels"
    streams = False
    body = object_of("input", model=MODEL, input=INPUT, use_activation=BOOL, user=TEXT)

    def request_model(self, body: dict[str, Any]) -> str:
        return "vllm.entrypoints.pooling.classify.protocol:ClassificationCompletionRequest"

    async def call(self, serving: Any, request: Any) -> Any:
        """With labels by the base's names where there are as many as the base has, else as transformers
        calls those without a name: ``LABEL_0``."""
        classifier = serving.serving_classification
        told = await numbers_of(classifier(request))
        config = classifier.model_config.hf_config
        for one in told.get("data", ()):
            if one["num_classes"] != config.num_labels:
                one["label"] = f"LABEL_{max(range(len(one['probs'])), key=one['probs'].__getitem__)}"
        return told

    def document(self, call: Call, result: Any) -> dict[str, Any]:
        """Plain data. Unavailable if it was aborted."""
        if call.aborted:
            raise Unavailable("The server is shutting down.", code="shutting_down", retry_after=5)
        shown: dict[str, Any] = result
        return shown

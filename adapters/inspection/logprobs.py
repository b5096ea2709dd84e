"""What two models make of the same prompts, compared by their log-probabilities or embeddings. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import mul

# Several kinds of text, since an adapter may show on some only; short, since each upload costs all of them.
PROMPTS = (
    "The capital of France is",
    "Question: Why is the sky blue?\nAnswer:",
    "def fibonacci(n):\n    if n < 2:\n        return",
    '{"name": "Ada", "language": "',
)
# Below this no reader could tell two models apart: of 10,000 tokens that are drawn, one would be another.
NEGLIGIBLE = 1e-4
# Noise is a sample: what is not an effect may come out as a few times another one.
NOISE_FACTOR = 3
_LEAST = 1e-12  # of a probability, so that its logarithm is a number

# One position: the likeliest next tokens, and the one that stands there, with their log-probabilities.
Step = Mapping[str, float]
# For each prompt its positions.
Scores = Sequence[Sequence[Step]]
# For each prompt its embedding.
Vectors = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Difference:
    """``log_prob`` is the largest change of a token's log-probability, in nats, over all that both name.

    ``kl`` is the mean over all positions of the Kullback-Leibler divergence of the next token's
    distribution, in nats, with what only one of them names taken together: the true one is not smaller.
    """

    log_prob: float
    kl: float

    def exceeds(self, noise: Difference) -> bool:
        """Whether it is clearly more than ``noise``, which a model shows against itself, and than nothing."""
        return self.log_prob > max(NOISE_FACTOR * noise.log_prob, NEGLIGIBLE) or self.kl > max(
            NOISE_FACTOR * noise.kl, NEGLIGIBLE
        )


@dataclass(frozen=True, slots=True)
class Shift:
    """``change`` is how far an embedding moves at most, as a part of its length; ``cosine`` is the largest
    cosine distance, from 0 to 2."""

    change: float
    cosine: float

    def exceeds(self, noise: Shift) -> bool:
        """As of ``Difference``."""
        return self.change > max(NOISE_FACTOR * noise.change, NEGLIGIBLE)


def shift(before: Vectors, after: Vectors) -> Shift:
    """Both of the same prompts, and finite. Another number of labels is a whole change."""
    pairs = list(zip(before, after, strict=True))
    if any(len(old) != len(new) for old, new in pairs):
        return Shift(1.0, 1.0)
    moved = [math.dist(old, new) / (math.hypot(*old) or 1.0) for old, new in pairs]
    return Shift(max(moved, default=0.0), max(itertools.starmap(_cosine_distance, pairs), default=0.0))


def finite_vectors(vectors: Vectors) -> bool:
    return all(math.isfinite(number) for vector in vectors for number in vector)


def _cosine_distance(old: Sequence[float], new: Sequence[float]) -> float:
    lengths = math.hypot(*old) * math.hypot(*new)
    return max(0.0, 1 - sum(map(mul, old, new)) / lengths) if lengths else 0.0


def compare(before: Scores, after: Scores) -> Difference:
    """Both of the same prompts. The numbers are NaN where a score is."""
    pairs = list(_pairs(before, after))
    changes = [abs(new[token] - old[token]) for old, new in pairs for token in old.keys() & new.keys()]
    divergences = [_divergence(old, new) for old, new in pairs]
    largest = math.nan if any(map(math.isnan, changes)) else max(changes, default=0.0)
    return Difference(largest, sum(divergences) / max(1, len(divergences)))


def finite(scores: Scores) -> bool:
    return all(math.isfinite(number) for steps in scores for step in steps for number in step.values())


def _pairs(before: Scores, after: Scores) -> Iterator[tuple[Step, Step]]:
    for old_steps, new_steps in zip(before, after, strict=True):
        yield from zip(old_steps, new_steps, strict=True)


def _divergence(old: Step, new: Step) -> float:
    """KL(old || new) over the tokens that both name and one more for all the rest."""
    shared = old.keys() & new.keys()
    p = [math.exp(old[token]) for token in shared]
    q = [math.exp(new[token]) for token in shared]
    p.append(1 - sum(p))
    q.append(1 - sum(q))
    terms = (x * math.log(x / max(y, _LEAST)) for x, y in zip(p, q, strict=True) if not x <= _LEAST)
    return max(0.0, sum(terms)) if not any(map(math.isnan, p + q)) else math.nan

"""Every API surface. A new one is a file beside this one, and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from server.engine.calls import Kind
from server.inference.dialects.base import Dialect
from server.inference.dialects.chat import Chat
from server.inference.dialects.classify import Classify
from server.inference.dialects.completions import Completions
from server.inference.dialects.embeddings import Embeddings
from server.inference.dialects.messages import Messages
from server.inference.dialects.responses import Responses
from server.inference.dialects.scoring import PAIRS, Rerank, Scoring
from server.inference.dialects.tokens import CountTokens, Detokenize, Tokenize

# Those that run in the engine with a lease, in the order of the documentation.
ANSWERING: tuple[Dialect, ...] = (Chat(), Completions(), Responses(), Messages(), Embeddings(), Classify())
# Those that are answered from scores: the engine is asked for embeddings, or in ``PAIRS`` for both.
SCORING: tuple[Scoring, ...] = (Rerank(), PAIRS)
# Those that the tokenizer answers alone.
COUNTING: tuple[Dialect, ...] = (CountTokens(), Tokenize(), Detokenize())
DIALECTS: Mapping[Kind, Dialect] = {dialect.name: dialect for dialect in (*ANSWERING, PAIRS, *COUNTING)}

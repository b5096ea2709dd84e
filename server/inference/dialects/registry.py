"""Every API surface: each ``Dialect`` with a path that a file beside this one defines."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping

from server.engine.calls import Kind
from server.inference import dialects
from server.inference.dialects.base import Dialect
from server.inference.dialects.scoring import Scoring


def found_in(folders: Iterable[str]) -> Iterator[Dialect]:
    """One of each dialect that the modules in ``folders`` of this package define, by name of the module."""
    for module in sorted(one.name for one in pkgutil.iter_modules(list(folders))):
        if f"{dialects.__name__}.{module}" != __name__:
            made = importlib.import_module(f"{dialects.__name__}.{module}")
            for one in vars(made).values():
                own = isinstance(one, type) and one.__module__ == made.__name__
                if own and issubclass(one, Dialect) and "path" in vars(one):
                    yield one()


# In the order of the documentation.
SURFACES: tuple[Dialect, ...] = tuple(sorted(found_in(dialects.__path__), key=lambda one: one.place))
# Those that are answered from scores: the engine is asked for embeddings, or in ``PAIRS`` for both.
SCORING: tuple[Scoring, ...] = tuple(one for one in SURFACES if isinstance(one, Scoring))
# Those that the tokenizer answers alone.
COUNTING: tuple[Dialect, ...] = tuple(one for one in SURFACES if one.counts)
# Those that run in the engine with a lease as they are.
ANSWERING: tuple[Dialect, ...] = tuple(one for one in SURFACES if one not in (*SCORING, *COUNTING))
# Those that the engine is asked in.
DIALECTS: Mapping[Kind, Dialect] = {
    one.name: one for one in SURFACES if type(one).request_model is not Dialect.request_model
}

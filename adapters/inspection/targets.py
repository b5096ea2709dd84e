"""Which modules PEFT would adapt: ``check_target_module_exists`` of ``peft/tuners/tuners_utils.py``.

PEFT ignores tensors of modules that its config does not target; vLLM serves every tensor. Expressions in an
upload are never run: where one decides, the tensors are taken at their word, as PEFT wrote both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from adapters.inspection.module_names import suffixes

# Without any operator but ".", which is any one character: linear by construction.
_LITERAL = re.compile(r"[A-Za-z0-9_.-]{1,512}")
_LAYER = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")
_MOST_LAYER_PATTERNS = 16

Names = frozenset[str] | str


@dataclass(frozen=True, slots=True)
class Targets:
    """PEFT's fields of the same names; a string is an expression, except "all-linear" as ``modules``."""

    modules: Names
    exclude: Names
    layers: frozenset[int] | None
    layers_pattern: tuple[str, ...]

    @classmethod
    def of(
        cls,
        target_modules: Iterable[str] | str,
        exclude_modules: Iterable[str] | str | None,
        layers_to_transform: Iterable[int] | int | None,
        layers_pattern: Iterable[str] | str | None,
    ) -> Targets:
        """An empty list of layers, or of patterns for them, is none, as in PEFT."""
        layers = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
        patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or ()
        return cls(
            _names(target_modules),
            _names(exclude_modules or ()),
            frozenset(layers) if layers else None,
            tuple(pattern for pattern in patterns if pattern),
        )

    def covers(self, module: str) -> bool | None:
        """Whether PEFT adapts ``module``; None where only running an expression could tell.

        Excluded goes before targeted. A full name counts in every layer, a suffix only in ``layers``; an
        expression knows of no layers.
        """
        excluded = _is_listed(module, self.exclude)
        if excluded:
            return False
        targeted = True if self.modules == "all-linear" else _is_listed(module, self.modules)
        if targeted and not isinstance(self.modules, str) and module not in self.modules:
            targeted = self._is_in_layers(module)
        if targeted is False:
            return False
        return None if excluded is None else targeted

    def _is_in_layers(self, module: str) -> bool | None:
        if self.layers is None:
            return True
        if len(self.layers_pattern) > _MOST_LAYER_PATTERNS:
            return None
        found = None if self.layers_pattern else _LAYER.match(module)
        for pattern in self.layers_pattern:
            if not _LITERAL.fullmatch(pattern):
                return None
            found = found or re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", module)
        return found is not None and int(found["index"]) in self.layers


def _names(names: Iterable[str] | str) -> Names:
    return names if isinstance(names, str) else frozenset(names)


def _is_listed(module: str, names: Names) -> bool | None:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None if _LITERAL.fullmatch(names) else None
    return any(suffix in names for suffix in suffixes(module))

"""Which modules PEFT would adapt: ``check_target_module_exists`` of ``peft/tuners/tuners_utils.py``.

PEFT ignores tensors of modules that its config does not target; vLLM serves every tensor. Expressions in an
upload are run by ``run`` alone, and elsewhere; see ``adapters.inspection.expressions``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from adapters.inspection.expressions import Expression, Matches, run_all
from adapters.inspection.module_names import suffixes

# Without any operator but ".", which is any one character: linear by construction.
_LITERAL = re.compile(r"[A-Za-z0-9_.-]{1,512}")
_LAYER = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")
_MOST_LAYER_PATTERNS = 16

Names = frozenset[str] | str


@dataclass(frozen=True, slots=True)
class Targets:
    """PEFT's fields of the same names; a string is an expression, except "all-linear" as ``modules``.

    ``ran`` is what expressions were seen to match.
    """

    modules: Names
    exclude: Names
    layers: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    ran: Mapping[Expression, Matches] = field(default_factory=dict)

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

    @property
    def expressions(self) -> list[Expression]:
        """Those that only running them tells of."""
        wholes = [self.exclude] if self.modules == "all-linear" else [self.modules, self.exclude]
        layers = self.layers_pattern if self.layers is not None else ()
        found: list[Expression] = [("whole", one) for one in wholes if isinstance(one, str)]
        if not isinstance(self.modules, str) and len(layers) <= _MOST_LAYER_PATTERNS:
            found += [("layer", one) for one in layers]
        return [one for one in found if not _LITERAL.fullmatch(one[1])]

    def run(self, modules: Collection[str]) -> Targets:
        """These, with what their expressions match of ``modules``; one that takes too long stays unknown.

        Raises ValueError for what is no expression. Call it in a thread.
        """
        return replace(self, ran=run_all(self.expressions, modules))

    def covers(self, module: str) -> bool | None:
        """Whether PEFT adapts ``module``; None where an expression decides that was not run for it.

        Excluded goes before targeted. A full name counts in every layer, a suffix only in ``layers``; an
        expression knows of no layers.
        """
        excluded = self._is_listed(module, self.exclude)
        if excluded:
            return False
        targeted = True if self.modules == "all-linear" else self._is_listed(module, self.modules)
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
        index = found["index"] if found else None
        for pattern in self.layers_pattern:
            if _LITERAL.fullmatch(pattern):
                found = re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", module)
                if found:
                    index = found["index"]
                    break
            elif (ran := self.ran.get(("layer", pattern))) is None:
                return None
            elif module in ran:  # the first that matches decides, also without a number: "layers|h"
                index = ran[module]
                break
        return index is not None and int(index) in self.layers

    def _is_listed(self, module: str, names: Names) -> bool | None:
        if not isinstance(names, str):
            return any(suffix in names for suffix in suffixes(module))
        if _LITERAL.fullmatch(names):
            return re.fullmatch(names, module) is not None
        ran = self.ran.get(("whole", names))
        return None if ran is None else module in ran


def _names(names: Iterable[str] | str) -> Names:
    return names if isinstance(names, str) else frozenset(names)

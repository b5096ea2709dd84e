"""The plan's whole state at one moment, from which another plan goes on exactly as it did.

``as_json`` is a list of objects, the plan first; ``restored`` is the way back. A value is a JSON scalar, or
``{"ref": place}`` of an object in the list:

    {"list" | "tuple" | "set" | "frozenset": values}    {"dict" | "OrderedDict": [key, value] pairs}
    {"deque": values, "most": n}                        {"count": the next number}
    {"method": name, "of": value}                       {"enum": name, "value": text}
    {"object": class, "fields": values by name}

Only the classes of this package that a plan is made of are read back, and nothing of what is read is run.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from types import FunctionType, MethodType
from typing import Any, TypeVar, get_args

from server.scheduling.evidence import Evidence, Loss, Presence, Shares, Time
from server.scheduling.fair_queue import FairQueue, Lane, Request, TenantQueue
from server.scheduling.indices import Indices
from server.scheduling.loads import Claim, Load
from server.scheduling.nouns import Ask, Capacity, Effect, Refusal, State
from server.scheduling.plan import Plan
from server.scheduling.prefetch import Prefetch
from server.scheduling.ranking import FairShare, Ranking, RoundRobin
from server.scheduling.residency import Residency
from server.scheduling.suspects import Record, Suspects

T = TypeVar("T", bound=type)


def _named(*classes: T) -> dict[str, T]:
    return {one.__name__: one for one in classes}


_CLASSES: dict[str, type[Any]] = _named(
    Plan, FairQueue, TenantQueue, Request, Lane, Ranking, RoundRobin, FairShare, Residency, Prefetch, Indices,
    Load, Claim, Suspects, Record, Evidence, Presence, Time, Loss, Shares, Capacity, Ask, *get_args(Effect),
)  # fmt: skip
_ENUMS: dict[str, type[State] | type[Refusal]] = _named(State, Refusal)
_MAPPINGS: dict[str, type[Any]] = _named(dict, OrderedDict)
_VALUES: dict[str, type[Any]] = _named(list, tuple, set, frozenset)
_SCALARS = (type(None), bool, int, float, str)


def as_json(plan: Plan) -> list[dict[str, Any]]:
    """Everything that ``plan`` is made of. TypeError for what the list above does not have."""
    found: list[dict[str, Any]] = []
    for _ in steps(plan, found):
        pass
    return found


def steps(plan: Plan, found: list[dict[str, Any]]) -> Iterator[None]:
    """The same into ``found``, a small piece of work at a step. ``plan`` must stay as it is meanwhile."""
    return _Writer().steps(plan, found)


def restored(objects: Sequence[Mapping[str, Any]]) -> Plan:
    """The plan of ``as_json``. ValueError where that is not one of this release's."""
    try:
        plan = _Reader(objects).read()
    except (LookupError, TypeError, AttributeError) as exc:
        raise ValueError(f"not the state of a plan of this release: {exc!r}") from exc
    if not isinstance(plan, Plan):
        raise ValueError(f"not the state of a plan: {type(plan).__name__}")
    return plan


def _fields(cls: type) -> list[str]:
    """The slots of a class, also those that it inherits."""
    return [name for one in cls.__mro__ for name in one.__dict__.get("__slots__", ())]


class _Writer:
    """An object is written when it is first met, and is a reference everywhere."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._met: list[Any] = []  # keeps them, or an id could be another object's

    def steps(self, root: Any, found: list[dict[str, Any]]) -> Iterator[None]:
        self._value(root)
        while len(found) < len(self._met):
            found.append(self._object(self._met[len(found)]))
            yield

    def _value(self, value: Any) -> Any:
        if type(value) in _SCALARS:
            return value
        place = self._places.setdefault(id(value), len(self._met))
        if place == len(self._met):
            self._met.append(value)
        return {"ref": place}

    def _values(self, values: Iterable[Any]) -> list[Any]:
        return [self._value(value) for value in values]

    def _object(self, one: Any) -> dict[str, Any]:
        cls = type(one)
        name = cls.__name__
        if _VALUES.get(name) is cls:
            return {name: self._values(sorted(one, key=repr) if isinstance(one, set | frozenset) else one)}
        if _MAPPINGS.get(name) is cls:
            return {name: [self._values(pair) for pair in one.items()]}
        if cls is deque:
            return {"deque": self._values(one), "most": one.maxlen}
        if cls is count:
            return {"count": int(repr(one)[len("count(") : -1])}  # Python 3.14 does not pickle one
        if cls is MethodType:
            return {"method": one.__name__, "of": self._value(one.__self__)}
        if _ENUMS.get(name) is cls:
            return {"enum": name, "value": one.value}
        if _CLASSES.get(name) is cls:
            fields = vars(one) if hasattr(one, "__dict__") else {f: getattr(one, f) for f in _fields(cls)}
            if cls is Ranking:  # without entries that are stale, in an order that is a heap's too
                fields["_heap"] = sorted(fields["_entries"].values())
            return {"object": name, "fields": {f: self._value(value) for f, value in fields.items()}}
        raise TypeError(f"a plan's state has no {cls.__module__}.{cls.__qualname__}")


class _Reader:
    """Everything that can be filled later is made empty first, so that objects may refer to each other."""

    def __init__(self, objects: Sequence[Mapping[str, Any]]) -> None:
        self._objects = objects
        self._made: dict[int, Any] = {}

    def read(self) -> Any:
        for place, one in enumerate(self._objects):
            if "object" in one:
                cls = _CLASSES[one["object"]]
                self._made[place] = object.__new__(cls)
            elif "deque" in one:
                self._made[place] = deque(maxlen=one["most"])
            elif kind := next((name for name in ("list", "set", *_MAPPINGS) if name in one), None):
                self._made[place] = (_VALUES | _MAPPINGS)[kind]()
        for place, one in enumerate(self._objects):
            self._fill(self._at(place), one)
        return self._at(0)

    def _value(self, value: Any) -> Any:
        return self._at(value["ref"]) if isinstance(value, Mapping) else value

    def _at(self, place: int) -> Any:
        if place not in self._made:
            self._made[place] = self._complete(self._objects[place])
        return self._made[place]

    def _complete(self, one: Mapping[str, Any]) -> Any:
        """What cannot be changed once it is made."""
        for kind in ("tuple", "frozenset"):
            if kind in one:
                return _VALUES[kind](map(self._value, one[kind]))
        if "count" in one:
            return count(one["count"])
        if "enum" in one:
            return _ENUMS[one["enum"]](one["value"])
        owner, name = self._value(one["of"]), one["method"]
        method = getattr(type(owner), name) if type(owner) in _CLASSES.values() else None
        if not isinstance(method, FunctionType):
            raise TypeError(f"{name!r} is no method of {type(owner).__name__}")
        return MethodType(method, owner)

    def _fill(self, made: Any, one: Mapping[str, Any]) -> None:
        if "object" in one:
            for name, value in one["fields"].items():
                object.__setattr__(made, name, self._value(value))
        elif "list" in one or "deque" in one:
            made.extend(map(self._value, one.get("list") or one.get("deque") or ()))
        elif "set" in one:
            made.update(map(self._value, one["set"]))
        else:
            for kind in _MAPPINGS:
                for key, value in one.get(kind, ()):
                    made[self._value(key)] = self._value(value)

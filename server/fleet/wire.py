"""What gateways and replicas say to each other. Pure: bytes and values, no I/O.

A gateway posts an order (JSON) and reads frames, each of four bytes of length, one of kind, and a payload:

    RUNNING   {"load": seconds}                       it has a place in the engine; its adapter took so long
    ASKS      [prompt, output, sequences]             what the engine has counted; not more than was reserved
    LARGER    the same                                more than was reserved: nothing ran, ask again with more
    CHUNK     totals, new token ids, the text         everything that the tokens so far have to say
    MOVE      {}                                      the replica stops; go on elsewhere if you can
    BODY      a part of the body's JSON               of a long document, before its END; not read by gateways
    END       totals, the last text, body or error    the last frame

A stream that ends without END is broken: what its CHUNKs said is whole, and it can be asked for again with
the tokens that they held. An upload goes the other way, as OPTIONS, PIECEs (file name and bytes), and END.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from adapters import errors as adapter_errors
from adapters.model import Version
from server import errors
from server.accounts.tenants import Tenant

PREFIX = "/internal/v1"
OPEN = f"{PREFIX}/open"
# What one frame, and the JSON of one order beside its body, may come to.
MAX_FRAME = 64 << 20
MAX_ENVELOPE = 16 << 20
_HEAD = struct.Struct("!IB")
_TOTALS = struct.Struct("!?IIII")


class Kind(IntEnum):
    RUNNING = 1
    ASKS = 2
    LARGER = 3
    CHUNK = 4
    MOVE = 5
    END = 6
    OPTIONS = 7
    PIECE = 8
    BODY = 9


_KINDS: Mapping[int, Kind] = {kind.value: kind for kind in Kind}


class Malformed(ValueError):
    """What came is not what a process of this version sends."""


class Oversized(errors.Internal):
    """A frame beyond ``MAX_FRAME``: its sender is well, and another one would send the same."""


@dataclass(frozen=True, slots=True)
class Granted:
    """What limits have reserved for a request, and with ``most`` how many tokens a sequence may have.

    ``by_cost`` if output must not take the place of prompt, which costs less.
    """

    prompt: int
    output: int
    by_cost: bool = False
    most: int | None = None

    def covers(self, prompt: int, output: int) -> bool:
        """Whether a request of so many tokens may run."""
        return prompt + output <= self.prompt + self.output and (not self.by_cost or output <= self.output)


@dataclass(frozen=True, slots=True)
class WireOrder:
    """An order as it crosses; ``fields`` are those of ``server.inference.completion.Order``.

    ``granted`` is None where no limit counts tokens. ``said`` and ``cached`` are those of
    ``server.engine.calls.Relay``. ``in_parts``: the gateway takes BODY frames.
    """

    id: str
    tenant: Tenant
    dialect: str
    fields: dict[str, Any]
    version: Version | None
    public_model: str
    prompt_bound: int
    prompt_tokens: int
    elastic: bool
    elsewhere: float = 0.0
    granted: Granted | None = None
    said: Sequence[int] = ()
    cached: int = 0
    in_parts: bool = False

    def encoded(self) -> bytes:
        tenant = self.tenant
        return json.dumps(
            {
                "id": self.id,
                "tenant": [tenant.id, tenant.cache_salt, tenant.share, tenant.max_queued, tenant.max_running],
                "background": tenant.background,
                "dialect": self.dialect,
                "fields": self.fields,
                "version": as_json(self.version) if self.version else None,
                "public": self.public_model,
                "bound": self.prompt_bound,
                "prompt": self.prompt_tokens,
                "elastic": self.elastic,
                "elsewhere": self.elsewhere,
                "granted": None
                if self.granted is None
                else [self.granted.prompt, self.granted.output, self.granted.by_cost, self.granted.most],
                "said": list(self.said),
                "cached": self.cached,
                "parts": self.in_parts,
            },
            separators=(",", ":"),
        ).encode()

    @classmethod
    def decoded(cls, raw: bytes, path: Callable[[str], Path]) -> WireOrder:
        """``path`` says where the files of a digest are. Raises Malformed."""
        try:
            sent = json.loads(raw)
            granted, version = sent["granted"], sent["version"]
            return cls(
                id=str(sent["id"]),
                tenant=_tenant(*sent["tenant"], background=bool(sent.get("background"))),
                dialect=str(sent["dialect"]),
                fields=dict(sent["fields"]),
                version=version_of(version, path) if version else None,
                public_model=str(sent["public"]),
                prompt_bound=int(sent["bound"]),
                prompt_tokens=int(sent["prompt"]),
                elastic=bool(sent["elastic"]),
                elsewhere=float(sent.get("elsewhere", 0.0)),  # an older gateway says nothing of it
                granted=Granted(*granted) if granted else None,
                said=[int(token) for token in sent["said"]],
                cached=int(sent["cached"]),
                in_parts=bool(sent.get("parts")),  # not those of the release before
            )
        except (ValueError, KeyError, TypeError) as exc:
            raise Malformed(f"not an order: {exc}") from exc


def _tenant(
    id_: str, salt: str, share: float, max_queued: int | None, max_running: int | None, *, background: bool
) -> Tenant:
    """As much of a tenant as a replica needs: its weight is its share already."""
    return Tenant(
        id=id_,
        name=id_,
        weight=float(share),
        base_allowed=True,
        max_queued=max_queued,
        max_running=max_running,
        created_at=datetime.fromtimestamp(0, UTC),
        cache_salt=salt,
        background=background,
    )


def as_json(version: Version) -> dict[str, Any]:
    """A version as it crosses."""
    return {
        "tenant": version.tenant,
        "adapter": version.adapter,
        "number": version.number,
        "digest": version.digest,
        "rank": version.rank,
        "size": version.size_bytes,
        "chat": dict(version.chat),
        "base": version.base,
    }


def version_of(sent: Mapping[str, Any], path: Callable[[str], Path]) -> Version:
    """What ``as_json`` made, with the files where ``path`` has them. Raises ValueError, KeyError."""
    digest = str(sent["digest"])
    names = str(sent["tenant"]), str(sent["adapter"])
    size, chat = int(sent["size"]), dict(sent.get("chat") or {})
    rank, base = int(sent["rank"]), sent.get("base")
    return Version(*names, int(sent["number"]), digest, path(digest), rank, size, base=base, chat=chat)


# --- frames --------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """``total`` output tokens so far, the last of them ``ids``. ``movable`` as ``Relay.begins`` is told.

    A tuple, which is made in a third of a frozen dataclass's time: one is, for every token.
    """

    movable: bool
    prompt: int
    cached: int
    total: int
    ids: tuple[int, ...]
    text: str

    def encoded(self) -> bytes:
        head = _TOTALS.pack(self.movable, self.prompt, self.cached, self.total, len(self.ids))
        return frame(
            Kind.CHUNK, b"".join((head, struct.pack(f"!{len(self.ids)}I", *self.ids), self.text.encode()))
        )

    @classmethod
    def decoded(cls, payload: bytes) -> Chunk:
        movable, prompt, cached, total, count = _TOTALS.unpack_from(payload)
        ids = struct.unpack_from(f"!{count}I", payload, _TOTALS.size)
        return cls(movable, prompt, cached, total, ids, payload[_TOTALS.size + 4 * count :].decode())


@dataclass(frozen=True, slots=True)
class End:
    """How it ended. ``error`` is None where it was answered: with ``tail``, the last text, or ``body``.

    ``finish`` is why the answer ended, see ``Lease``.
    """

    prompt: int
    cached: int
    output: int
    tail: str = ""
    body: dict[str, Any] | None = None
    error: Exception | None = None
    finish: str | None = None

    def encoded(self) -> bytes:
        totals = [self.prompt, self.cached, self.output]
        error = error_as_json(self.error) if self.error is not None else None
        sent = {"totals": totals, "tail": self.tail, "body": self.body, "error": error}
        return framed(Kind.END, sent | {"finish": self.finish})

    @classmethod
    def decoded(cls, payload: bytes) -> End:
        sent = json.loads(payload)
        error = error_of(sent["error"]) if sent["error"] else None
        prompt, cached, output = sent["totals"]
        # A replica of the release before, during an upgrade, does not say why the answer ended.
        return cls(prompt, cached, output, sent["tail"], sent["body"], error, sent.get("finish"))


def piece(name: str, data: bytes) -> bytes:
    """A part of an uploaded file."""
    encoded = name.encode("utf-8", "surrogatepass")
    return frame(Kind.PIECE, struct.pack("!H", len(encoded)) + encoded + data)


def piece_of(payload: bytes) -> tuple[str, bytes]:
    """(file name, bytes)."""
    (length,) = struct.unpack_from("!H", payload)
    return payload[2 : 2 + length].decode("utf-8", "surrogatepass"), payload[2 + length :]


def frame(kind: Kind, payload: bytes) -> bytes:
    """As bytes."""
    return _HEAD.pack(len(payload), kind) + payload


def framed(kind: Kind, sent: Any) -> bytes:
    """As bytes, with JSON as the payload."""
    return frame(kind, json.dumps(sent, separators=(",", ":")).encode())


def json_of(payload: bytes) -> Any:
    """What ``framed`` took."""
    return json.loads(payload)


class Frames:
    """Puts the pieces that a connection gives together again."""

    def __init__(self) -> None:
        self._waiting: list[bytes] = []  # put together once they are a frame, not with every piece
        self._missing = 0  # bytes until then

    def feed(self, data: bytes) -> list[tuple[Kind, bytes]]:
        """The frames that are whole with ``data``. Raises Malformed, and Oversized."""
        whole = data
        if self._waiting:
            self._waiting.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return []
            whole = b"".join(self._waiting)
        at, found, missing = 0, [], _HEAD.size
        while len(whole) - at >= _HEAD.size:
            length, kind = _HEAD.unpack_from(whole, at)
            if length > MAX_FRAME:
                raise Oversized(f"A message of {length} bytes within the fleet, {MAX_FRAME} being the most.")
            end = at + _HEAD.size + length
            if end > len(whole):
                missing = end - at
                break
            if kind not in _KINDS:
                raise Malformed(f"a frame of the kind {kind}")
            found.append((_KINDS[kind], whole[at + _HEAD.size : end]))
            at = end
        rest = whole[at:]
        self._waiting, self._missing = [rest] if rest else [], missing - len(rest)
        return found


# --- errors --------------------------------------------------------------------------------------------


def _subclasses(root: type[Exception]) -> dict[str, type[Any]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _subclasses(child)
    return found


def error_as_json(error: Exception) -> dict[str, Any]:
    """Of a ServerError or an AdapterError; anything else is a defect of the replica, whose log has it."""
    if not isinstance(error, errors.ServerError | adapter_errors.AdapterError):
        error = errors.Internal("The replica failed on this request.")
    return {
        "class": type(error).__name__,
        "message": error.message,
        "code": error.code,
        "param": error.param,
        "retry_after": getattr(error, "retry_after", None),
    }


def error_of(sent: Mapping[str, Any]) -> errors.ServerError | adapter_errors.AdapterError:
    """What ``error_as_json`` told; Internal for a class that is unknown here."""
    known = _subclasses(errors.ServerError) | _subclasses(adapter_errors.AdapterError)
    made = known.get(str(sent["class"]), errors.Internal)(
        str(sent["message"]), code=sent["code"], param=sent["param"]
    )
    if sent["retry_after"] is not None:
        made.retry_after = sent["retry_after"]
    assert isinstance(made, errors.ServerError | adapter_errors.AdapterError)
    return made

"""The events of the bus and their one wire form: `type` (text) and `body` (a msgpack map).

Promise: an `Event` that exists is valid, whether it was built here or read from a stream, and `decode` answers any
bytes at all with an event or with `InvalidEvent`, whose message is fit to be a dead letter's reason; it never raises
anything else. Unknown keys of a body are ignored, so that a newer publisher can talk to an older reader. There is no
pickle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeVar

import msgpack

from em_bridge import fields as check
from em_bridge.errors import InvalidEvent
from em_bridge.fields import wire

MAX_BODY_BYTES: Final = 1024 * 1024
MAX_PAYLOAD_BYTES: Final = MAX_BODY_BYTES - 1024
"""A message's payload: the body's limit less room for the other keys."""
MAX_DEPTH: Final = 16

ALIVE: Final = "ALIVE"
DEGRADED: Final = "DEGRADED"
DEAD: Final = "DEAD"
STATES: Final = (ALIVE, DEGRADED, DEAD)

INBOX_PREFIX: Final = "em:inbox:"
EM: Final = "em"
"""The agent id of the execution manager."""


class Event:
    """Base of all events; a subclass is a frozen dataclass with slots whose fields are made by `fields.wire`.

    Raises `InvalidEvent` on construction when a field does not keep to the contract.
    """

    __slots__ = ()
    type: ClassVar[str]
    stream: ClassVar[str]

    def __post_init__(self) -> None:
        for key, name, rule, optional, _ in _layout(type(self)):
            value = getattr(self, name)
            if value is None and optional:
                continue
            try:
                checked = rule(value)
            except ValueError as problem:
                raise InvalidEvent(f"{self.type}: “{key}” {problem}") from None
            if checked is not value:
                object.__setattr__(self, name, checked)


E = TypeVar("E", bound=type[Event])
_TYPES: dict[str, type[Event]] = {}
_Layout = tuple[tuple[str, str, Callable[[Any], Any], bool, bool], ...]
_LAYOUTS: dict[type[Event], _Layout] = {}


def register(cls: E) -> E:
    """Make `cls` known to `decode`; other packages add their events with this decorator."""
    known = _TYPES.setdefault(cls.type, cls)
    if known is not cls and known.__qualname__ != cls.__qualname__:
        raise ValueError(f"two events claim the type {cls.type!r}")
    _TYPES[cls.type] = cls
    return cls


def _layout(cls: type[Event]) -> _Layout:
    """Return (key on the wire, attribute, rule, may be None, is required) of each field of `cls` that travels."""
    layout = _LAYOUTS.get(cls)
    if layout is None:
        layout = tuple(
            (
                f.metadata.get("key") or f.name,
                f.name,
                f.metadata["rule"],
                f.default is None,
                f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING,
            )
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]  # every subclass is a dataclass
            if "rule" in f.metadata
        )
        _LAYOUTS[cls] = layout
    return layout


@register
@dataclass(frozen=True, slots=True)
class AgentState(Event):
    """The EM's word on an agent: `ALIVE`, `DEGRADED` or `DEAD`; `at` in Unix seconds."""

    type: ClassVar[str] = "agent.state"
    stream: ClassVar[str] = "em:agent-state"
    agent: str = wire(check.agent_id)
    state: str = wire(check.one_of(*STATES))
    reason: str = wire(check.text, default="")
    at: float | None = wire(check.moment, default=None)
    incarnation: str | None = wire(check.label, default=None)


@register
@dataclass(frozen=True, slots=True)
class ConfigProposed(Event):
    """Somebody asks for a change; `proposed` maps a path to the new content."""

    type: ClassVar[str] = "config.proposed"
    stream: ClassVar[str] = "em:config-change"
    change: str = wire(check.label)
    agent: str = wire(check.agent_id)
    paths: tuple[str, ...] = wire(check.paths)
    by: str = wire(check.label)
    reason: str = wire(check.text, default="")
    at: float | None = wire(check.moment, default=None)
    proposed: Mapping[str, bytes] | None = wire(check.contents, default=None)


@register
@dataclass(frozen=True, slots=True)
class ConfigApproved(Event):
    """A human (or the EM) says yes to a change; `signature` is an SSH signature, if there is one."""

    type: ClassVar[str] = "config.approved"
    stream: ClassVar[str] = "em:config-change"
    change: str = wire(check.label)
    by: str = wire(check.label)
    reason: str = wire(check.text, default="")
    at: float | None = wire(check.moment, default=None)
    signature: str | bytes | None = wire(check.text_or_blob, default=None)


@register
@dataclass(frozen=True, slots=True)
class ConfigRejected(Event):
    """A human says no to a change."""

    type: ClassVar[str] = "config.rejected"
    stream: ClassVar[str] = "em:config-change"
    change: str = wire(check.label)
    by: str = wire(check.label)
    reason: str = wire(check.text, default="")
    at: float | None = wire(check.moment, default=None)
    signature: str | bytes | None = wire(check.text_or_blob, default=None)


@register
@dataclass(frozen=True, slots=True)
class ConfigApplied(Event):
    """A change has been written into the agent's files."""

    type: ClassVar[str] = "config.applied"
    stream: ClassVar[str] = "em:config-change"
    change: str = wire(check.label)
    agent: str = wire(check.agent_id)
    paths: tuple[str, ...] = wire(check.paths)
    by: str = wire(check.text, default="")
    approved_by: str | None = wire(check.text, default=None)
    reason: str = wire(check.text, default="")
    at: float | None = wire(check.moment, default=None)


@register
@dataclass(frozen=True, slots=True)
class Message(Event):
    """One message; `seq` grows per sender. `log` (its entry in the message log) is there only in an inbox.

    `entry` never travels: it is the inbox entry that `Agent.ack` acknowledges.
    """

    type: ClassVar[str] = "message"
    stream: ClassVar[str] = "em:messages"
    sender: str = wire(check.agent_id, key="from")
    to: str = wire(check.agent_id)
    seq: int = wire(check.count)
    payload: bytes = wire(check.blob)
    at: float | None = wire(check.moment, default=None)
    log: str | None = wire(check.entry_id, default=None)
    entry: str | None = dataclasses.field(default=None, compare=False, repr=False)


@register
@dataclass(frozen=True, slots=True)
class Heartbeat(Event):
    """“I am here”: `incarnation` is unique per process start; the entry id, not the agent, says when."""

    type: ClassVar[str] = "heartbeat"
    stream: ClassVar[str] = "em:heartbeats"
    agent: str = wire(check.agent_id)
    incarnation: str = wire(check.label)
    seq: int = wire(check.count)
    status: str = wire(check.text, default="")
    pid: int | None = wire(check.count, default=None)


@register
@dataclass(frozen=True, slots=True)
class DeadLetter(Event):
    """An entry that could not be handled: where it stood, why, and its fields as they were."""

    type: ClassVar[str] = "dead-letter"
    stream: ClassVar[str] = "em:dead-letter"
    source: str = wire(check.text, key="stream")
    entry: str = wire(check.text)
    reason: str = wire(check.text)
    at: float = wire(check.moment)
    raw: Mapping[str, bytes] = wire(check.blobs)


def to_wire(event: Event) -> dict[str, Any]:
    """Return the event's body as a map, without the optional keys that are not set."""
    body: dict[str, Any] = {}
    for key, name, _, optional, _ in _layout(type(event)):
        value = getattr(event, name)
        if not (optional and value is None):
            body[key] = value
    return body


def encode(event: Event) -> dict[bytes, bytes]:
    """Return the two fields of a stream entry. Raises `InvalidEvent` if the body is larger than 1 MiB."""
    return {b"type": event.type.encode(), b"body": encode_body(event)}


def encode_body(event: Event, **more: Any) -> bytes:
    """Return the body alone, with `more` keys. Raises `InvalidEvent` if it is larger than 1 MiB."""
    body: bytes = msgpack.packb(to_wire(event) | more)
    if len(body) > MAX_BODY_BYTES:
        raise InvalidEvent(
            f"{event.type}: the body has {len(body)} bytes, the limit is {MAX_BODY_BYTES}",
            hint="keep large content in a file, and send its path",
        )
    return body


def decode(entry: Mapping[bytes, bytes], *, stream: str | None = None) -> Event:
    """Return the event in the fields of a stream entry.

    With `stream`, the event must belong there (a `message` also belongs in any inbox). Raises `InvalidEvent`, and
    nothing else, for whatever else the fields hold.
    """
    cls = _class_of(entry.get(b"type"))
    if stream is not None and not belongs(cls, stream):
        raise InvalidEvent(f"{cls.type}: does not belong on “{stream}”")
    body = _unpack(cls.type, entry.get(b"body"))
    values: dict[str, Any] = {}
    for key, name, _, _, required in _layout(cls):
        value = body.get(key)
        if value is not None:
            values[name] = value
        elif required:
            raise InvalidEvent(f"{cls.type}: “{key}” is missing")
    return cls(**values)


def belongs(cls: type[Event], stream: str) -> bool:
    """Say whether events of `cls` may stand on `stream`."""
    return cls.stream == stream or (cls is Message and stream.startswith(INBOX_PREFIX))


def _class_of(raw: object) -> type[Event]:
    if raw is None:
        raise InvalidEvent("the entry has no field “type”")
    if not isinstance(raw, bytes):
        raise InvalidEvent("the field “type” is not bytes")
    name = raw[:64].decode("utf-8", "backslashreplace")
    cls = _TYPES.get(name)
    if cls is None or len(raw) > 64:
        raise InvalidEvent(f"unknown type {check.shown(name)}")
    return cls


def _unpack(kind: str, raw: object) -> dict[Any, Any]:
    if not isinstance(raw, bytes):
        raise InvalidEvent(f"{kind}: the entry has no field “body”")
    if len(raw) > MAX_BODY_BYTES:
        raise InvalidEvent(f"{kind}: the body has {len(raw)} bytes, the limit is {MAX_BODY_BYTES}")
    try:
        body = msgpack.unpackb(raw, strict_map_key=False)
    except msgpack.ExtraData:
        raise InvalidEvent(f"{kind}: bytes follow the body's msgpack map") from None
    except (msgpack.StackError, RecursionError):
        raise InvalidEvent(f"{kind}: the body is nested too deep") from None
    # What the parser raises depends on the byte it stumbles over: UnicodeDecodeError, TypeError for an unhashable key,
    # OverflowError for a time stamp. The reader must outlive them all.
    except Exception as problem:  # noqa: BLE001  # any byte string must end as InvalidEvent
        detail = str(problem).strip().splitlines()
        raise InvalidEvent(
            f"{kind}: the body is not msgpack ({detail[0][:100] if detail else 'malformed'})"
        ) from None
    if not isinstance(body, dict):
        raise InvalidEvent(f"{kind}: the body is not a map")
    if len(body) != _announced(raw):
        raise InvalidEvent(f"{kind}: a key stands twice in the body")
    if not _CONTAINERS.isdisjoint(map(type, body.values())):
        _check_depth(kind, body)
    return body


_CONTAINERS: Final = frozenset((dict, list))


def _announced(raw: bytes) -> int:
    """Return how many pairs the map in `raw` announces; a parser that met a key twice returns fewer."""
    if raw[0] == 0xDE:
        return int.from_bytes(raw[1:3], "big")
    if raw[0] == 0xDF:
        return int.from_bytes(raw[1:5], "big")
    return raw[0] & 0x0F


def _check_depth(kind: str, body: dict[Any, Any]) -> None:
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for node in level:
            children = node.values() if isinstance(node, dict) else node
            inner.extend(child for child in children if isinstance(child, (dict, list)))
        if not inner:
            return
        level = inner
    raise InvalidEvent(f"{kind}: the body is nested deeper than {MAX_DEPTH} levels")

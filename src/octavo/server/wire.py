"""What processes say to each other: frozen dataclasses as msgpack in frames, each checked as it comes in.

A frame is 4 bytes of length (big endian) and one msgpack array [kind, fields]; an event that is a token and nothing
else, as most are, is the pair [key, token]. Nothing here can run code: never pickle, no extension types, a bounded
length, and each field is checked against its annotation. Errors travel as
their class's name and numbers (`Fault`), and become the same class again. Who reads when is the business of
`octavo.server.worker` and `octavo.server.worker_link`, `octavo.server.child` and `octavo.server.warm_children`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import msgpack

from octavo import errors
from octavo.errors import OctavoError
from octavo.types import FinishReason, Grammar, Request, TokenEvent, TokenizerSource, TokenLogprob

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MAX_FRAME_BYTES = 128 << 20
"""A model's tokenizer, the largest message, takes tens of megabytes."""
LENGTH_BYTES = 4
_NUMBERS = ("needed_bytes", "available_bytes", "prompt_tokens", "context_tokens")


class WireError(Exception):
    """The other process sent what is not a message: the connection cannot go on."""


# --- front -> worker ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """The first message: `settings` are the fields of `octavo.settings.Settings`, paths as text."""

    version: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Proceed:
    """The answer to `Planned`: there is room, load it."""


@dataclass(frozen=True, slots=True)
class Ends:
    """Sent once, when the model is loaded: what ends a text, also by its template, which the worker does not run."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Submit:
    """`key` is the front's own number for this request; all its events carry it."""

    key: int
    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    key: int


@dataclass(frozen=True, slots=True)
class AskFacts:
    """Answered by `Facts`."""


@dataclass(frozen=True, slots=True)
class Close:
    """Close the model and end."""


# --- worker -> front ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """An error on its way through the wire. `kind` is its class in `octavo.errors`."""

    kind: str
    message: str
    remedy: str
    parameter: str = ""
    numbers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Loading:
    """Progress, as `octavo.types.Progress` gives it."""

    stage: str
    done_bytes: int
    total_bytes: int | None


@dataclass(frozen=True, slots=True)
class Planned:
    """Bytes this model will take, known before any of them is taken. The worker waits for `Proceed`."""

    needed_bytes: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded: all that a front needs to make requests and text for it."""

    location: str
    revision: str | None
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tokenizer: TokenizerSource | None
    chat_template: str | None
    fingerprint: str
    vocab_size: int
    context_tokens: int
    max_sequences: int
    grammars: bool
    """Whether the backend takes `Request.grammar`."""
    facts: Mapping[str, Any]
    """`octavo.load_facts`, and how the weights came."""
    notices: tuple[str, ...] = ()
    """What the user should know of the load."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The model cannot be loaded; the worker ends."""

    fault: Fault


@dataclass(frozen=True, slots=True)
class Event:
    """A `TokenEvent` under the front's key."""

    key: int
    token_id: int | None = None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    fault: Fault | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    cached_tokens: int = 0
    queued_seconds: float = 0.0

    def token_event(self) -> TokenEvent:
        return TokenEvent(
            request_id=self.key,
            token_id=self.token_id,
            logprob=self.logprob,
            finish_reason=self.finish_reason,
            error=None if self.fault is None else error_from(self.fault),
            prompt_logprobs=self.prompt_logprobs,
            cached_tokens=self.cached_tokens,
            queued_seconds=self.queued_seconds,
        )


@dataclass(frozen=True, slots=True)
class Events:
    """What one or more steps brought, in order."""

    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """`Backend.info()` now, and the process's own resident memory."""

    facts: Mapping[str, Any]


# --- to a warm child -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Template:
    """The first message to a child that renders: the source of a chat template."""

    source: str


@dataclass(frozen=True, slots=True)
class Render:
    """The fields of `octavo.text.template_rendering.Rendering`, as JSON. Answered by `Rendered`."""

    asked: str


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The first message to a child that compiles grammars: for which vocabulary."""

    tokenizer: TokenizerSource
    vocab_size: int
    end_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Check:
    """Answered by `Done` where it compiles."""

    grammar: Grammar


# --- from a warm child -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rendered:
    """`octavo.text.provenance.TemplateText`."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Done:
    """Nothing is to be said against it."""


@dataclass(frozen=True, slots=True)
class Refused:
    """In place of the answer."""

    fault: Fault


ToChild: TypeAlias = Template | Render | Vocabulary | Check
FromChild: TypeAlias = Rendered | Done | Refused
ToWorker: TypeAlias = Load | Proceed | Ends | Submit | Cancel | AskFacts | Close
FromWorker: TypeAlias = Loading | Planned | Ready | Failed | Events | Facts

_KINDS: Mapping[str, type] = {
    kind.__name__: kind for group in (ToChild, FromChild, ToWorker, FromWorker) for kind in get_args(group)
}


def event_of(key: int, event: TokenEvent) -> Event:
    return Event(
        key,
        event.token_id,
        event.logprob,
        event.finish_reason,
        None if event.error is None else fault_of(event.error),
        event.prompt_logprobs,
        event.cached_tokens,
        event.queued_seconds,
    )


# --- messages <-> bytes --------------------------------------------------------------------------------


def encode(message: ToWorker | FromWorker | ToChild | FromChild) -> bytes:
    """A whole frame. Raises WireError where it would be too long, or holds what cannot travel."""
    fields = {"events": [_row(event) for event in message.events]} if isinstance(message, Events) else message
    try:
        body: bytes = msgpack.packb([type(message).__name__, _plain(fields)], use_bin_type=True)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WireError(f"a {type(message).__name__} cannot be sent: {error}") from error
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(
            f"a {type(message).__name__} has {len(body)} bytes; at most {MAX_FRAME_BYTES} are sent"
        )
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def frame_length(head: bytes) -> int:
    """Bytes that follow a frame's head. Raises WireError for more than MAX_FRAME_BYTES."""
    length = int.from_bytes(head, "big")
    if length > MAX_FRAME_BYTES:
        raise WireError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES} are taken")
    return length


def decode(body: bytes) -> Any:
    """The message in a frame's body. Raises WireError for anything that is none."""
    from pydantic import ValidationError

    try:
        kind, fields = msgpack.unpackb(body, raw=False, strict_map_key=False)
        cls = _KINDS[kind]
        unknown = set(fields) - {each.name for each in dataclasses.fields(cls)}
        if unknown:
            raise WireError(f"a {kind} with unknown fields")
        if cls is Events:
            return Events(tuple([_event(row) for row in fields["events"]]))
        return _adapter(cls).validate_python(fields)
    except (ValidationError, ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise WireError(f"not a message: {type(error).__name__}") from error


def decode_trusted(body: bytes) -> Any:
    """`decode` without a look at the fields, for messages of plain fields from the process that started this one:
    a child that has to start quickly need not import what checks them."""
    kind, fields = msgpack.unpackb(body, raw=False, strict_map_key=False)
    return _KINDS[kind](**fields)


def _row(event: Event) -> Any:
    bare = (
        event.logprob is None
        and event.finish_reason is None
        and event.fault is None
        and event.prompt_logprobs is None
        and not event.cached_tokens
        and not event.queued_seconds
    )
    return [event.key, event.token_id] if bare and event.token_id is not None else _plain(event)


def _event(row: Any) -> Event:
    if type(row) is list:
        key, token_id = row
        if type(key) is not int or type(token_id) is not int:
            raise WireError("an event that is no pair of numbers")
        return Event(key, token_id)
    event: Event = _adapter(Event).validate_python(row)
    return event


def _plain(value: Any) -> Any:
    """Dataclasses as maps of the fields that are not at their default; the rest as msgpack takes it."""
    if value is None or type(value) in (int, str, bool, bytes, float):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            name: _plain(said)
            for name, default in _fields(type(value))
            if (said := getattr(value, name)) is not default and said != default
        }
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(each) for each in value]
    if isinstance(value, str):  # enumerations of text
        return str(value)
    to_list = getattr(value, "tolist", None)  # numpy: the arrays of a GGUF tokenizer
    return to_list() if callable(to_list) else value


@functools.cache
def _fields(cls: type) -> tuple[tuple[str, Any], ...]:
    return tuple((each.name, each.default) for each in dataclasses.fields(cls))


@functools.cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    import numpy as np  # noqa: F401  (annotations of octavo.types name it, and pydantic looks for it here)
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


# --- errors <-> faults -----------------------------------------------------------------------------------


def fault_of(error: BaseException) -> Fault:
    """What crosses the wire of an error. One that is not ours says only what class it was."""
    if not isinstance(error, OctavoError):
        return Fault(
            "OctavoError", f"internal error: {type(error).__name__}", "Report this, with the request's id."
        )
    numbers = {name: getattr(error, name) for name in _NUMBERS if hasattr(error, name)}
    parameter = getattr(error, "parameter", "") or getattr(error, "key", "")
    return Fault(type(error).__name__, error.message, error.remedy, parameter, numbers)


def error_from(fault: Fault) -> OctavoError:
    """The error of a fault, of the same class where that is known."""
    cls = getattr(errors, fault.kind, OctavoError)
    more: dict[str, Any] = dict(fault.numbers)
    if isinstance(cls, type) and issubclass(cls, errors.InvalidParameterError):
        more = {"parameter": fault.parameter}
    elif cls is errors.UnsupportedConfigError:
        more = {"key": fault.parameter}
    try:
        error: OctavoError = cls(fault.message, remedy=fault.remedy, **more)
    except TypeError:
        error = OctavoError(fault.message, remedy=fault.remedy)
    return error


def finite(value: Any) -> Any:
    """Facts as JSON can say them: what is not finite is None, what is no plain value is text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return finite(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)

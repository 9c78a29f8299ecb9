"""Messages between front and worker: they come out as they went in, and nothing else comes in."""

from __future__ import annotations

import dataclasses
import pickle

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo import errors
from octavo.server import wire
from octavo.types import FinishReason, Grammar, Request, Sampling, TokenEvent, TokenizerSource, TokenLogprob

IDS = st.integers(0, 200_000)
LOGPROBS = st.builds(
    TokenLogprob,
    IDS,
    st.floats(-100, 0),
    st.lists(st.tuples(IDS, st.floats(-100, 0)), max_size=3).map(tuple),
)
SAMPLING = st.builds(
    Sampling,
    temperature=st.floats(0, 2),
    seed=st.integers(0, 2**64 - 1),
    logit_bias=st.lists(st.tuples(IDS, st.floats(-100, 100)), max_size=3).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
)
REQUESTS = st.builds(
    Request,
    prompt_token_ids=st.lists(IDS, min_size=1, max_size=20).map(tuple),
    sampling=SAMPLING,
    max_new_tokens=st.integers(0, 9999),
    stop_token_ids=st.frozensets(IDS, max_size=4),
    prompt_logprobs=st.none() | st.integers(0, 5),
    salt=st.text(st.characters(codec="utf-8"), max_size=8),
    grammar=st.none() | st.builds(Grammar, st.sampled_from(["json_schema", "regex", "lark"]), st.just("a")),
)
EVENTS = st.builds(
    wire.Event,
    st.integers(0, 2**40),
    token_id=st.none() | IDS,
    logprob=st.none() | LOGPROBS,
    finish_reason=st.none() | st.sampled_from(FinishReason),
    prompt_logprobs=st.none() | st.lists(LOGPROBS, max_size=3).map(tuple),
    cached_tokens=st.integers(0, 99),
    queued_seconds=st.floats(0, 9),
)


def there_and_back(message):
    frame = wire.encode(message)
    head, body = frame[: wire.LENGTH_BYTES], frame[wire.LENGTH_BYTES :]
    assert wire.frame_length(head) == len(body)
    return wire.decode(body)


@given(st.integers(0, 2**40), REQUESTS)
def test_requests(key, request):
    assert there_and_back(wire.Submit(key, request)) == wire.Submit(key, request)


@given(st.lists(EVENTS, max_size=5).map(tuple))
def test_events(events):
    assert there_and_back(wire.Events(events)) == wire.Events(events)


def test_a_tokenizer_with_arrays_arrives_as_lists():
    source = TokenizerSource(
        "gguf", metadata={"tokenizer.ggml.scores": np.arange(3, dtype=np.float32), "x": ["a"]}
    )
    ready = wire.Ready("m", None, {"a": [1]}, {}, source, "t", "f", 10, 20, 3, True, {"quant": ["int8"]})
    back = there_and_back(ready)
    assert back.tokenizer.metadata == {"tokenizer.ggml.scores": [0.0, 1.0, 2.0], "x": ["a"]}
    assert dataclasses.replace(back, tokenizer=None) == dataclasses.replace(ready, tokenizer=None)


def test_what_cannot_travel_is_refused_where_it_starts():
    request = Request((1,), Sampling(), 1, logits_processors=(lambda ids, logits: logits,))
    with pytest.raises(wire.WireError):
        wire.encode(wire.Submit(1, request))


@given(st.binary(max_size=80))
def test_garbage_is_no_message(body):
    with pytest.raises(wire.WireError):
        wire.decode(body)


@pytest.mark.parametrize(
    "value",
    [
        ["Nothing", {}],
        ["Submit", {}],
        ["Submit", {"key": "x", "request": {}}],
        ["Cancel", {"key": 1, "more": 2}],
        ["Cancel", [1]],
        ["Cancel", {"key": None}],
        ["Events", {"events": [{"key": 1, "finish_reason": "because"}]}],
        ["Events", {"events": [[1]]}],
        ["Events", {"events": [[1, 2, 3]]}],
        ["Events", {"events": [[1, "x"]]}],
        ["Events", {"events": [[1, None]]}],
        ["Events", {"events": [[True, 2]]}],
        ["Events", {"events": 5}],
        ["Events", {}],
        ["Cancel"],
        {"Cancel": 1},
        5,
        ["Event", {"key": 1}],
        ["Fault", {"kind": "x", "message": "m", "remedy": "r"}],
    ],
)
def test_what_does_not_fit_a_message_is_refused(value):
    with pytest.raises(wire.WireError):
        wire.decode(msgpack.packb(value))


def test_nothing_is_unpickled(tmp_path):
    class Canary:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    for body in (pickle.dumps(Canary()), msgpack.packb(msgpack.ExtType(0, pickle.dumps(Canary())))):
        with pytest.raises(wire.WireError):
            wire.decode(body)
    assert list(tmp_path.iterdir()) == []


def test_a_frame_has_a_largest_size():
    assert wire.frame_length(wire.MAX_FRAME_BYTES.to_bytes(4, "big")) == wire.MAX_FRAME_BYTES
    with pytest.raises(wire.WireError):
        wire.frame_length((wire.MAX_FRAME_BYTES + 1).to_bytes(4, "big"))


@pytest.mark.parametrize(
    "error",
    [
        errors.NumericalError("m", remedy="r"),
        errors.InvalidParameterError("m", remedy="r", parameter="top_p"),
        errors.UnsupportedConfigError("m", remedy="r", key="k"),
        errors.NotEnoughMemoryError("m", remedy="r", needed_bytes=5, available_bytes=3),
        errors.ContextLengthError("m", remedy="r", prompt_tokens=5, context_tokens=3),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_arrive_as_their_class(error):
    event = wire.event_of(7, TokenEvent(1, finish_reason=FinishReason.ERROR, error=error))
    (back,) = there_and_back(wire.Events((event,))).events
    arrived = back.token_event().error
    assert type(arrived) is type(error)
    assert vars(arrived) == vars(error)


def test_an_error_that_is_not_ours_says_only_its_class():
    fault = wire.fault_of(ValueError("/secret 0x7f00"))
    assert "secret" not in fault.message
    assert "ValueError" in fault.message

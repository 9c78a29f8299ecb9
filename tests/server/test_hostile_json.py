"""Figure 22: bodies that no client means are answered with 400 in our shape, and nothing else happens."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.server import strict_json
from octavo.server.faults import HttpFault

DEEP = 100_000
CHAT = '{"model":"fake","messages":[{"role":"user","content":"x"}],%s}'
BODIES = {
    "NaN": CHAT % '"temperature":NaN',
    "Infinity": CHAT % '"temperature":Infinity',
    "minus Infinity": CHAT % '"temperature":-Infinity',
    "1e999": CHAT % '"temperature":1e999',
    "5,000 digits": CHAT % f'"seed":{"1" * 5000}',
    "5,000 digits of a fraction": CHAT % f'"temperature":0.{"1" * 5000}',
    "deep arrays": "[" * DEEP,
    "deep objects": '{"a":' * DEEP,
    "deep in a field": CHAT % f'"metadata":{"[" * DEEP}{"]" * DEEP}',
    "65 deep": CHAT % f'"metadata":{"[" * 64}{"]" * 64}',
    "lone surrogate": CHAT % r'"user":"\ud800"',
    "lone surrogate in content": r'{"model":"fake","messages":[{"role":"user","content":"\udc00x"}]}',
    "lone surrogate in a key": CHAT % r'"\ud800":1',
    "lone surrogate in a list": CHAT % r'"stop":["\ud83d"]',
    "twice the same key": CHAT % '"n":1,"n":2',
    "twice in an inner object": CHAT % '"metadata":{"a":1,"a":2}',
    "array": "[1,2]",
    "string": '"x"',
    "number": "5",
    "null": "null",
    "true": "true",
    "empty": "",
    "blank": "  \n",
    "two values": "{} {}",
    "trailing comma": '{"a":1,}',
    "comment": '{"a":1} // x',
    "single quotes": "{'a':1}",
    "unquoted key": "{a:1}",
    "control character": '{"a":"\x01"}',
    "hexadecimal": '{"a":0x10}',
    "leading zero": '{"a":01}',
    "plus": '{"a":+1}',
    "unterminated": '{"a":"',
    "unterminated escape": '{"a":"\\',
    "byte order mark": '\ufeff{"a":1}',
}
RAW = {
    "latin-1": b'{"model":"\xe9"}',
    "overlong": b'{"model":"\xc0\xaf"}',
    "surrogate in UTF-8": b'{"model":"\xed\xa0\x80"}',
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "zero bytes": b"\x00" * 100,
    "truncated character": b'{"model":"\xe4\xb8',
}
WRONG_TYPES = {
    "model": 5,
    "messages": "x",
    "temperature": "hot",
    "top_p": [],
    "top_k": 1.5,
    "min_p": True,
    "n": "1",
    "max_tokens": 2.5,
    "stop": {"a": 1},
    "stream": "yes",
    "stream_options": [],
    "presence_penalty": "x",
    "frequency_penalty": {},
    "logit_bias": [1],
    "logprobs": 1,
    "top_logprobs": True,
    "seed": 1.5,
    "response_format": "json",
    "ignore_eos": 1,
    "user": 7,
    "metadata": "x",
    "cache_salt": "a b",
}
REQUESTS = {name: text.encode() for name, text in BODIES.items()} | RAW
REQUESTS |= {
    f"wrong type of {name}": json.dumps(
        {"model": "fake", "messages": [{"role": "user", "content": "x"}], name: value}
    ).encode()
    for name, value in WRONG_TYPES.items()
}


def test_there_are_sixty_of_them():
    assert len(REQUESTS) >= 60


@pytest.mark.parametrize("name", REQUESTS)
def test_a_hostile_body_is_a_400_in_our_shape(fake, name):
    response = fake.client.post(
        "/v1/chat/completions", content=REQUESTS[name], headers={"content-type": "application/json"}
    )
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    if name.startswith("wrong type of "):
        assert error["param"].startswith(name.removeprefix("wrong type of "))
    assert fake.engine()["running"] == 0


def test_a_long_hostile_body_takes_no_long_time(fake):
    for body in (b'{"a":"' + b'\\"' * 2_000_000, b"[" * 4_000_000, b'{"a":' + b"1" * 4_000_000):
        response = fake.client.post(
            "/v1/completions", content=body, headers={"content-type": "application/json"}, timeout=5
        )
        assert response.status_code == 400


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), _JSON, max_size=5), st.booleans())
def test_what_is_json_is_read_as_python_reads_it(value, ascii_only):
    assert strict_json.parse(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary(max_size=60))
def test_anything_else_is_refused_in_one_way(body):
    try:
        found = strict_json.parse(body)
    except HttpFault as fault:
        found = fault
    assert isinstance(found, dict) or (found.status, found.code) == (400, "invalid_json")

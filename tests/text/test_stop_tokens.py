"""Which ids end a generation."""

from __future__ import annotations

import json
from typing import Any

import pytest

from octavo.errors import ModelFormatError
from octavo.text.chat import ChatTemplate
from octavo.text.stop_tokens import stop_token_ids
from octavo.text.tokenizer import Tokenizer, load_tokenizer
from octavo.types import TokenizerSource


def with_tokens(byte_level_json: str, *tokens: str, special: bool = True, **config: Any) -> Tokenizer:
    import tokenizers

    pipeline = tokenizers.Tokenizer.from_str(byte_level_json)
    if special:
        pipeline.add_special_tokens(list(tokens))
    else:
        pipeline.add_tokens(list(tokens))
    return load_tokenizer(TokenizerSource("tokenizer.json", pipeline.to_str().encode(), config=config))


@pytest.fixture
def bare(byte_level_json: str) -> Tokenizer:
    """Without any known end of turn."""
    data = json.loads(byte_level_json)
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["special"]]
    return load_tokenizer(TokenizerSource("tokenizer.json", json.dumps(data).encode()))


@pytest.mark.parametrize(
    ("config", "generation_config", "expected"),
    [
        ({}, {}, set()),
        ({"eos_token_id": 5}, {}, {5}),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, {5, 6, 7}),
        ({"text_config": {"eos_token_id": 8}}, {"eos_token_id": [7]}, {7, 8}),
        ({"eos_token_id": None}, {"eos_token_id": -1}, set()),
        ({"eos_token_id": 0}, {}, {0}),
    ],
)
def test_what_the_configs_say(
    bare: Tokenizer, config: dict[str, Any], generation_config: dict[str, Any], expected: set[int]
) -> None:
    assert stop_token_ids(config, generation_config, bare) == expected
    assert stop_token_ids(config, generation_config, None) == expected


@pytest.mark.parametrize("bad", ["2", [1, "2"], True, {"id": 2}, 1.5])
def test_what_is_no_id_is_refused(bare: Tokenizer, bad: Any) -> None:
    with pytest.raises(ModelFormatError, match="eos_token_id"):
        stop_token_ids({"eos_token_id": bad}, {}, bare)


def test_known_ends_of_turn(byte_level_json: str) -> None:
    tokenizer = with_tokens(byte_level_json, "<|eot_id|>", "<end_of_turn>", "<|other|>")
    expected = {
        tokenizer.token_id(token) for token in ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")
    }
    assert stop_token_ids({}, {}, tokenizer) == expected


def test_an_end_that_is_only_text_is_none(byte_level_json: str) -> None:
    tokenizer = with_tokens(byte_level_json, "<end_of_turn>", special=False)
    assert tokenizer.token_id("<end_of_turn>") not in stop_token_ids({}, {}, tokenizer)


def test_the_tokenizers_own_eos(byte_level_json: str) -> None:
    tokenizer = with_tokens(byte_level_json, "<mine>", eos_token="<mine>")
    assert tokenizer.token_id("<mine>") in stop_token_ids({}, {}, tokenizer)


def test_harmony_goes_on_after_a_channel(byte_level_json: str) -> None:
    some = with_tokens(byte_level_json, "<|end|>", "<|return|>")
    harmony = with_tokens(byte_level_json, "<|end|>", "<|return|>", "<|call|>")
    assert some.token_id("<|end|>") in stop_token_ids({}, {}, some)
    assert harmony.token_id("<|end|>") not in stop_token_ids({}, {}, harmony)
    assert harmony.token_id("<|end|>") in stop_token_ids(
        {"eos_token_id": harmony.token_id("<|end|>")}, {}, harmony
    )


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }}<over>\n{% endfor %}", True),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }}\n<over>\n{% endfor %}", True),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }} then <over>{% endfor %}", False),
        ("{% for m in messages %}<over>{{ m.role }}: {{ m.content }}\n{% endfor %}", False),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}<over>{% endfor %}", False),
        ("{{ raise_exception('no') }}", False),
    ],
)
def test_what_the_template_writes_after_an_answer(byte_level_json: str, template: str, ends: bool) -> None:
    tokenizer = with_tokens(byte_level_json, "<over>")
    chat = ChatTemplate(template, tokenizer)
    over = tokenizer.token_id("<over>")
    assert (over in stop_token_ids({}, {}, tokenizer, chat)) is ends
    assert over not in stop_token_ids({}, {}, tokenizer)

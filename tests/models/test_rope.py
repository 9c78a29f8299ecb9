"""Every rope scaling on both sides of the original length, against transformers; and what it is fixed for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from octavo.errors import IncompatibleModelError, ModelFormatError, UnsupportedConfigError
from octavo.models import build_model

ORIGINAL = 64
_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}
_PAIRS = 8
_SHORT = [1.0 + 0.1 * i for i in range(_PAIRS)]
_LONG = [1.5 + 0.9 * i for i in range(_PAIRS)]
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn": _YARN,
    "yarn-betas": _YARN | {"beta_fast": 8, "beta_slow": 2},
    "yarn-attention-factor": _YARN | {"attention_factor": 1.4},
    "yarn-mscale": _YARN | {"mscale": 1.3, "mscale_all_dim": 0.7},
    "yarn-not-truncated": _YARN | {"truncate": False},
    "yarn-by-ratio": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": ORIGINAL},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": _SHORT,
        "long_factor": _LONG,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope-attention-factor": {
        "rope_type": "longrope",
        "short_factor": _SHORT,
        "long_factor": _LONG,
        "factor": 2.0,
        "attention_factor": 1.2,
        "original_max_position_embeddings": ORIGINAL,
    },
}


def llama(scaling: str, theta: float = 10000.0) -> LlamaConfig:
    length = ORIGINAL if SCALINGS[scaling]["rope_type"] == "dynamic" else 4 * ORIGINAL
    parameters = SCALINGS[scaling] | {"rope_theta": theta}
    return LlamaConfig(**_SIZES, max_position_embeddings=length, rope_parameters=parameters)


def rope_of(config: dict[str, Any], context_tokens: int | None = None) -> Any:
    return build_model(config, "huggingface", context_tokens=context_tokens)[0].layers[0].mixer.rope


@pytest.mark.parametrize("tokens", [ORIGINAL - 14, ORIGINAL, ORIGINAL + 50])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_logits_agree(scaling, tokens, make):
    """For a context of exactly the sequence: transformers chooses by its length."""
    model = make(llama(scaling), context_tokens=tokens)
    ids = np.random.default_rng(tokens).integers(0, 96, tokens).tolist()
    theirs, ours = model.their_logits(ids), model.our_logits(ids)
    assert (ours - theirs).norm() / theirs.norm() < 3e-5


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_the_other_side_is_another_model(scaling, make):
    """The negative control: fixed for the wrong side, the logits differ."""
    model = make(llama(scaling), context_tokens=ORIGINAL)
    ids = list(range(90))
    theirs, ours = model.their_logits(ids), model.our_logits(ids)
    assert (ours - theirs).norm() / theirs.norm() > 1e-2


@pytest.mark.parametrize("theta", [500.0, 10000.0, 1e6])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_agree(scaling, theta):
    config = llama(scaling, theta)
    theirs, rope = LlamaRotaryEmbedding(config), rope_of(config.to_dict(), ORIGINAL)
    np.testing.assert_allclose(rope.inverse_frequencies, theirs.inv_freq.numpy(), rtol=1e-6)
    assert rope.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_old_spelling(scaling):
    """rope_theta and rope_scaling with `type`, as transformers 4 wrote them."""
    config = llama(scaling).to_dict()
    expected = rope_of(config)
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    config["rope_scaling"] = parameters | {"type": parameters.pop("rope_type")}
    assert rope_of(config) == expected


def test_rope_is_fixed_for_the_context_asked_for():
    config = llama("longrope").to_dict()
    short, long = rope_of(config, ORIGINAL), rope_of(config, ORIGINAL + 1)
    assert "short factors" in short.reason
    assert "long factors" in long.reason
    assert rope_of(config) == rope_of(config, 4 * ORIGINAL)  # the config's own length
    assert rope_of(llama("yarn").to_dict()).reason == ""


def test_without_a_context_a_long_model_is_fixed_for_the_default_one():
    config = llama("longrope").to_dict() | {"max_position_embeddings": 1 << 20}
    config["rope_parameters"] = config["rope_parameters"] | {"original_max_position_embeddings": 8192}
    assert "short factors" in rope_of(config).reason
    assert "long factors" in rope_of(config, 8193).reason


@pytest.mark.parametrize(
    ("scaling", "tokens"), [("default", 256), ("linear", 256), ("dynamic", 192), ("yarn", 256)]
)
def test_longest_context(scaling, tokens):
    spec, _ = build_model(llama(scaling).to_dict(), "huggingface")
    assert spec.max_context_tokens == tokens


def test_yarn_added_to_a_config_reaches_further():
    config = llama("yarn").to_dict() | {"max_position_embeddings": ORIGINAL}
    assert build_model(config, "huggingface")[0].max_context_tokens == 4 * ORIGINAL


def test_partial_rotary_is_refused_where_the_family_rotates_whole_heads():
    config = llama("default").to_dict() | {"partial_rotary_factor": 0.5}
    with pytest.raises(UnsupportedConfigError, match="partial_rotary_factor"):
        rope_of(config)


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_longrope_of_phi3_under_its_older_names(name):
    rope = {"rope_theta": 10000.0, "short_factor": _SHORT, "long_factor": _LONG}
    config = Phi3Config(
        **_SIZES,
        max_position_embeddings=256,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters=rope | {"rope_type": "longrope"},
    ).to_dict()
    expected = rope_of(config)
    del config["rope_parameters"]
    config["rope_scaling"] = {"type": name, "short_factor": _SHORT, "long_factor": _LONG}
    assert rope_of(config) == expected
    assert expected.kind == "longrope"


@pytest.mark.parametrize(
    ("scaling", "change", "key"),
    [
        ("yarn", {"extrapolation_factor": 2.0}, "rope_parameters.extrapolation_factor"),
        ("linear", {"mscale": 2.0}, "rope_parameters.mscale"),
        ("default", {"rope_type": "mrope"}, "rope_parameters"),
        ("longrope", {"attn_factor": 2.0}, "rope_parameters.attn_factor"),
    ],
)
def test_unknown_parameters_are_refused_by_name(scaling, change, key):
    config = llama(scaling).to_dict()
    config["rope_parameters"] = config["rope_parameters"] | change
    with pytest.raises(UnsupportedConfigError) as caught:
        rope_of(config)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("scaling", "change", "word"),
    [
        ("linear", {"factor": None}, "factor is missing"),
        ("linear", {"factor": -1.0}, "above 0"),
        ("yarn", {"truncate": "yes"}, "truncate"),
        ("longrope", {"long_factor": [1.0] * 7}, "list of 8 numbers"),
        ("longrope", {"short_factor": [0.0] * 8}, "list of 8 numbers"),
        ("default", {"rope_theta": 1e-300}, "not finite"),
    ],
)
def test_parameters_that_make_no_sense_are_named(scaling, change, word):
    config = llama(scaling).to_dict()
    config["rope_parameters"] = config["rope_parameters"] | change
    with pytest.raises(ModelFormatError, match=word):
        rope_of(config)


_VALUES = (
    st.none() | st.booleans() | st.integers(-2, 1 << 40) | st.floats() | st.lists(st.floats(), max_size=9)
)


@settings(max_examples=200, deadline=None)
@given(
    scaling=st.sampled_from(sorted(SCALINGS)), data=st.data(), value=_VALUES, tokens=st.integers(1, 1 << 31)
)
def test_any_value_of_any_parameter_is_taken_or_refused(scaling, data, value, tokens):
    config = llama(scaling).to_dict()
    key = data.draw(st.sampled_from([*sorted(config["rope_parameters"]), "attention_factor", "truncate"]))
    config["rope_parameters"] = config["rope_parameters"] | {key: value}
    try:
        rope = rope_of(config, tokens)
    except IncompatibleModelError:
        return
    assert np.isfinite(rope.inverse_frequencies).all()
    assert torch.tensor(rope.attention_factor).isfinite()

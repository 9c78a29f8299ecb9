"""GGUF metadata -> config: the keys and values that the Hugging Face config of the same model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import Gemma2Config, LlamaConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from octavo.errors import ModelFormatError, UnsupportedConfigError
from octavo.sources.gguf import read_gguf
from octavo.sources.gguf_config import config_from_gguf, generation_config_from_gguf

LLAMA_KEYS = {
    "architectures",
    "attention_bias",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
}
GEMMA2_KEYS = LLAMA_KEYS - {"mlp_bias"} | {
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "hidden_activation",
    "query_pre_attn_scalar",
    "sliding_window",
}


def config_of(path: Path) -> dict[str, Any]:
    return config_from_gguf(read_gguf(path))


def same_config(config: dict[str, Any], expected: LlamaConfig | Gemma2Config) -> None:
    """What transformers makes of our config is what it makes of the original."""
    ours, theirs = type(expected)(**config).to_dict(), expected.to_dict()
    ignored = {"architectures", "bos_token_id", "eos_token_id", "pad_token_id", "dtype"}
    assert {k: v for k, v in ours.items() if k not in ignored} == {
        k: v for k, v in theirs.items() if k not in ignored
    }


def frequencies(config: dict[str, Any]) -> np.ndarray:
    """The rotary frequencies transformers computes, times its attention factor."""
    rope = LlamaRotaryEmbedding(LlamaConfig(**config))
    return rope.inv_freq.double().numpy() * rope.attention_scaling


# --- whole configs --------------------------------------------------------------------------------------


def test_llama(write_gguf):
    config = config_of(write_gguf(metadata={"llama.rope.freq_base": 500000.0}))
    assert set(config) == LLAMA_KEYS
    same_config(
        config,
        LlamaConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            max_position_embeddings=128,
            vocab_size=40,
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            tie_word_embeddings=True,
        ),
    )


def test_gemma2(write_gguf):
    path = write_gguf(
        architecture="gemma2",
        metadata={
            "gemma2.attention.key_length": 32,
            "gemma2.attention.value_length": 32,
            "gemma2.attention.sliding_window": 16,
            "gemma2.attn_logit_softcapping": 40.0,
            "gemma2.final_logit_softcapping": 20.0,
        },
    )
    config = config_of(path)
    assert set(config) == GEMMA2_KEYS
    same_config(
        config,
        Gemma2Config(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            query_pre_attn_scalar=32,
            intermediate_size=96,
            max_position_embeddings=128,
            vocab_size=40,
            rms_norm_eps=1e-5,
            sliding_window=16,
            attn_logit_softcapping=40.0,
            final_logit_softcapping=20.0,
            hidden_act="gelu_pytorch_tanh",
        ),
    )


def test_gemma2_defaults_are_llama_cpps(write_gguf):
    config = config_of(write_gguf(architecture="gemma2", metadata={"gemma2.attention.key_length": 32}))
    assert config["sliding_window"] == 4096
    assert config["attn_logit_softcapping"] == 50.0
    assert config["final_logit_softcapping"] == 30.0


def test_gemma2_27b_scales_scores_by_hidden_size_per_head(write_gguf):
    sizes = {"gemma2.attention.key_length": 32, "gemma2.attention.head_count": 4}
    small = config_of(write_gguf(architecture="gemma2", metadata=sizes))
    large = config_of(write_gguf(architecture="gemma2", metadata=sizes | {"gemma2.block_count": 46}))
    assert small["query_pre_attn_scalar"] == 32
    assert large["query_pre_attn_scalar"] == 64 // 4


def test_head_bias_and_tied_head_are_read_off_the_tensors(write_gguf):
    bias = np.zeros(64, np.float32)
    table = np.zeros((40, 64), np.float32)
    path = write_gguf(
        tensors={"output.weight": table, "blk.0.attn_q.bias": bias, "blk.0.ffn_gate.bias": bias},
    )
    config = config_of(path)
    assert not config["tie_word_embeddings"]
    assert config["attention_bias"]
    assert config["mlp_bias"]


def test_vocab_size_is_the_width_of_the_token_table(write_gguf):
    path = write_gguf(
        metadata={"llama.vocab_size": 38}, tensors={"token_embd.weight": np.zeros((48, 64), np.float32)}
    )
    assert config_of(path)["vocab_size"] == 48


@pytest.mark.model
def test_default_model_has_the_config_of_the_hub(default_model_path: Path):
    same_config(  # HuggingFaceTB/SmolLM2-135M-Instruct's config.json
        config_of(default_model_path),
        LlamaConfig(
            hidden_size=576,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            intermediate_size=1536,
            max_position_embeddings=8192,
            vocab_size=49152,
            rms_norm_eps=1e-5,
            rope_theta=100000,
            tie_word_embeddings=True,
        ),
    )


def agrees_with_transformers_mapping(path: Path) -> None:
    """All keys transformers' own GGUF loader knows; it knows fewer."""
    config, theirs = config_of(path), load_gguf_checkpoint(str(path))["config"]
    ids = generation_config_from_gguf(read_gguf(path).metadata, config["vocab_size"])
    assert theirs.pop("bos_token_id") == ids["bos_token_id"]
    assert theirs.pop("eos_token_id") in ids["eos_token_id"]
    assert theirs.pop("pad_token_id", None) == ids.get("pad_token_id")
    for key in ("_model_name_or_path", "unk_token_id"):
        theirs.pop(key, None)
    assert len(theirs) > 8
    for key, value in theirs.items():
        assert config[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_agrees_with_transformers_mapping(write_gguf, architecture: str):
    extra = {f"{architecture}.rope.freq_base": 20000.0, f"{architecture}.attention.key_length": 32}
    agrees_with_transformers_mapping(write_gguf(architecture=architecture, metadata=extra))


@pytest.mark.slow  # transformers takes 10 s to read the vocabulary
@pytest.mark.model
def test_default_model_agrees_with_transformers_mapping(default_model_path: Path):
    agrees_with_transformers_mapping(default_model_path)


# --- rope -----------------------------------------------------------------------------------------------


def llama3(factor: float, **changes: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    } | changes


HEAD_OF_128 = {"llama.attention.key_length": 128, "llama.attention.value_length": 128}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognized_in_the_rope_factors(write_gguf, factor: float):
    """The tensor is what llama.cpp's converter writes: unscaled over scaled frequency, in float32."""
    base = {"head_dim": 128, "rope_theta": 500000.0, "max_position_embeddings": 131072}
    scaled = frequencies(base | {"rope_scaling": llama3(factor)})
    divisors = (frequencies(base) / scaled).astype(np.float32)
    path = write_gguf(
        metadata=HEAD_OF_128 | {"llama.rope.freq_base": 500000.0, "llama.context_length": 131072},
        tensors={"rope_freqs.weight": divisors},
    )
    config = config_of(path)
    assert set(config) == LLAMA_KEYS | {"rope_scaling"}
    assert config["rope_scaling"] == llama3(factor)
    np.testing.assert_array_equal(frequencies(config), scaled)


def test_other_rope_factors_are_said_exactly(write_gguf):
    base = {"head_dim": 128, "rope_theta": 10000.0}
    scaling = llama3(8.0, original_max_position_embeddings=4096)
    scaled = frequencies(base | {"rope_scaling": scaling, "max_position_embeddings": 131072})
    divisors = (frequencies(base) / scaled).astype(np.float32)
    config = config_of(write_gguf(metadata=HEAD_OF_128, tensors={"rope_freqs.weight": divisors}))
    assert config["rope_scaling"]["rope_type"] == "longrope"
    np.testing.assert_allclose(frequencies(config), scaled, rtol=1e-6)


def test_rope_factors_of_another_shape_are_refused(write_gguf):
    path = write_gguf(tensors={"rope_freqs.weight": np.ones(9, np.float32)})
    with pytest.raises(ModelFormatError, match="rope_freqs"):
        config_of(path)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_rope_factors_that_are_no_divisors_are_refused(write_gguf, value: float):
    path = write_gguf(tensors={"rope_freqs.weight": np.full(8, value, np.float32)})
    with pytest.raises(ModelFormatError, match="rope_freqs"):
        config_of(path)


SCALING = "llama.rope.scaling."


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, None),
        ({SCALING + "type": "none", SCALING + "factor": 4.0}, None),
        ({SCALING + "type": "linear", SCALING + "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({SCALING + "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"llama.rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({SCALING + "type": "linear", SCALING + "factor": 1.0}, None),
        (
            {SCALING + "type": "yarn", SCALING + "factor": 4.0, SCALING + "original_context_length": 32},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        ),
    ],
)
def test_rope_scaling_keys(write_gguf, metadata: dict[str, Any], expected: dict[str, Any] | None):
    config = config_of(write_gguf(metadata=metadata))
    assert config.get("rope_scaling") == expected
    frequencies(config)  # transformers takes it


@pytest.mark.parametrize(
    ("metadata", "key"),
    [
        ({SCALING + "type": "longrope", SCALING + "factor": 4.0}, SCALING + "type"),
        ({SCALING + "attn_factor": 1.2}, SCALING + "attn_factor"),
        (
            {SCALING + "type": "yarn", SCALING + "factor": 4.0, SCALING + "yarn_ext_factor": 0.5},
            SCALING + "yarn_ext_factor",
        ),
        (
            {SCALING + "type": "yarn", SCALING + "factor": 4.0, SCALING + "yarn_log_multiplier": 0.1},
            SCALING + "yarn_log_multiplier",
        ),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length"),
        ({"llama.expert_gating_func": 2}, "llama.expert_gating_func"),
        ({"llama.attention.sliding_window": 4096}, "llama.attention.sliding_window"),
        ({"llama.logit_scale": 2.0}, "llama.logit_scale"),
        ({"llama.attention.head_count_kv": [2, 1]}, "llama.attention.head_count_kv"),
        ({"llama.something_new": "on"}, "llama.something_new"),
        ({"llama.attention.causal": False}, "llama.attention.causal"),
        ({"llama.expert_weights_norm": False}, "llama.expert_weights_norm"),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(write_gguf, metadata: dict[str, Any], key: str):
    with pytest.raises(UnsupportedConfigError) as caught:
        config_of(write_gguf(metadata=metadata))
    assert caught.value.key == key
    assert key in caught.value.message


@pytest.mark.parametrize(
    ("architecture", "metadata", "key"),
    [
        ("granite", {"granite.rope.scaling.finetuned": False}, "granite.rope.scaling.finetuned"),
        ("qwen2", {"qwen2.attention.sliding_window": 4096}, "qwen2.attention.sliding_window"),
        ("gemma3", {"gemma3.attn_logit_softcapping": 50.0}, "gemma3.attn_logit_softcapping"),
        ("gemma3", {"gemma3.rope.dimension_count": 8}, "gemma3.rope.dimension_count"),
        ("qwen3", {"qwen3.pooling_type": 3}, "qwen3.pooling_type"),
    ],
)
def test_what_an_architecture_cannot_say_is_refused_by_name(write_gguf, architecture, metadata, key):
    with pytest.raises(UnsupportedConfigError) as caught:
        config_of(write_gguf(architecture=architecture, metadata=metadata))
    assert caught.value.key == key


def test_keys_that_change_nothing_are_let_pass(write_gguf):
    path = write_gguf(
        metadata={
            "llama.expert_count": 0,
            "llama.expert_gating_func": 0,
            "llama.tensor_data_layout": "Meta AI original pth",
            "llama.rope.scaling.finetuned": True,
            "llama.use_parallel_residual": False,
            "llama.attention.causal": True,
            "other.expert_count": 8,
        }
    )
    assert set(config_of(path)) == LLAMA_KEYS


# --- other architectures (whole models: tests/models/test_gguf_end_to_end.py) ---------------------------


def test_gemma3_has_no_window_where_none_is_said(write_gguf):
    assert config_of(write_gguf(architecture="gemma3"))["layer_types"] == ["full_attention"] * 2


@pytest.mark.parametrize(
    ("pattern", "types"),
    [(None, "sssssf"), (3, "ssfssf"), ([True, False, True, True, True, False], "sfsssf")],
)
def test_gemma3_windows(write_gguf, pattern, types):
    metadata = {"gemma3.block_count": 6, "gemma3.attention.sliding_window": 512}
    if pattern is not None:
        metadata["gemma3.attention.sliding_window_pattern"] = pattern
    config = config_of(write_gguf(architecture="gemma3", metadata=metadata))
    assert "".join(kind[0] for kind in config["layer_types"]) == types
    assert config["sliding_window"] == 512


def test_a_pattern_of_another_length_is_malformed(write_gguf):
    metadata = {
        "gemma3.attention.sliding_window": 512,
        "gemma3.attention.sliding_window_pattern": [True, False, True],
    }
    with pytest.raises(ModelFormatError, match="one entry for each of 2 layers"):
        config_of(write_gguf(architecture="gemma3", metadata=metadata))


def test_half_of_longrope_is_malformed(write_gguf):
    tensors = {"rope_factors_long.weight": np.ones(8, np.float32)}
    with pytest.raises(ModelFormatError, match="lacks the tensor rope_factors_short"):
        config_of(write_gguf(architecture="phi3", tensors=tensors))


@pytest.mark.parametrize(("heads", "rotary"), [(4, 16), (4, 12), (4, 6), (1, 58), (2, 22)])
def test_a_partial_rotary_factor_gives_the_same_dims_again(write_gguf, heads, rotary):
    metadata = {
        "phi3.attention.head_count": heads,
        "phi3.attention.head_count_kv": 1,
        "phi3.rope.dimension_count": rotary,
    }
    config = config_of(write_gguf(architecture="phi3", metadata=metadata))
    assert int(config["head_dim"] * config["partial_rotary_factor"]) == rotary


# --- what is no model we know, or malformed -------------------------------------------------------------


def test_an_unknown_architecture_is_named(write_gguf):
    with pytest.raises(UnsupportedConfigError, match="mamba") as caught:
        config_of(write_gguf(architecture="mamba"))
    assert caught.value.key == "general.architecture"


def test_an_adapter_is_no_model(write_gguf):
    with pytest.raises(UnsupportedConfigError, match="adapter"):
        config_of(write_gguf(metadata={"general.type": "adapter"}))


@pytest.mark.parametrize(
    ("metadata", "key"),
    [
        ({"llama.block_count": None}, "block_count"),
        ({"llama.block_count": 0}, "block_count"),
        ({"llama.block_count": "two"}, "block_count"),
        ({"llama.embedding_length": True}, "embedding_length"),
        ({"llama.context_length": None}, "context_length"),
        ({"llama.attention.head_count": 0}, "attention.head_count"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "attention.layer_norm_rms_epsilon"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "attention.layer_norm_rms_epsilon"),
        ({"llama.rope.freq_base": float("inf")}, "rope.freq_base"),
    ],
)
def test_malformed_values_are_refused_by_name(write_gguf, metadata: dict[str, Any], key: str):
    with pytest.raises(ModelFormatError) as caught:
        config_of(write_gguf(metadata=metadata))
    assert key in caught.value.message


# --- generation config ----------------------------------------------------------------------------------


def test_stop_ids_are_all_that_end_an_answer(write_gguf):
    path = write_gguf(
        metadata={
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.eot_token_id": 5,
            "tokenizer.ggml.eom_token_id": 2,
            "tokenizer.ggml.padding_token_id": 4_294_967_295,
            "general.sampling.temp": 0.6,
            "general.sampling.top_k": 20,
        }
    )
    found = generation_config_from_gguf(read_gguf(path).metadata, vocab_size=40)
    assert found == {"bos_token_id": 1, "eos_token_id": [2, 5], "temperature": 0.6, "top_k": 20}


def test_no_ids_no_generation_config():
    assert generation_config_from_gguf({"tokenizer.ggml.eos_token_id": "2"}, vocab_size=40) == {}

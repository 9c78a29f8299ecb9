"""What a config says is computed, known to change nothing, or refused by the name of its key."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3TextConfig

from octavo.errors import IncompatibleModelError, ModelFormatError, UnsafeFileError, UnsupportedConfigError
from octavo.models import build_model
from octavo.models.unread import unread_notices, unread_tensors

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}
GEMMA2: dict[str, Any] = {
    key: value for key, value in LLAMA.items() if key not in ("hidden_act", "mlp_bias")
} | {
    "model_type": "gemma2",
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 16,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention", "full_attention"],
}


def build(config: dict[str, Any]) -> Any:
    return build_model(config, "huggingface")[0]


def test_the_configs_themselves_are_taken():
    """The negative control."""
    assert build(LLAMA).family == "llama"
    assert [layer.mixer.window for layer in build(GEMMA2).layers] == [16, None]


@pytest.mark.parametrize(
    ("base", "change", "key"),
    [
        (LLAMA, {"model_type": "gpt9"}, "model_type"),
        (LLAMA, {"hidden_act": "relu"}, "hidden_act"),
        (LLAMA, {"sliding_window": 4096}, "sliding_window"),
        (LLAMA, {"logit_scale": 0.5}, "logit_scale"),
        (LLAMA, {"rope_scaling": {"rope_type": "mrope", "factor": 4.0}}, "rope_scaling"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 4.0, "mscale": 2.0}}, "rope_scaling.mscale"),
        (LLAMA, {"rope_scaling": "linear"}, "rope_scaling"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"rope_scaling": {"partial_rotary_factor": 0.5}}, "rope_scaling.partial_rotary_factor"),
        (LLAMA, {"is_causal": False}, "is_causal"),
        (LLAMA, {"is_encoder_decoder": True}, "is_encoder_decoder"),
        (LLAMA, {"add_cross_attention": True}, "add_cross_attention"),
        (LLAMA, {"cross_attention_hidden_size": 64}, "cross_attention_hidden_size"),
        (LLAMA, {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        (LLAMA, {"scale_attn_weights": False}, "scale_attn_weights"),
        (LLAMA, {"rotary_pct": 0}, "rotary_pct"),
        (LLAMA, {"residual_multiplier": 0.0}, "residual_multiplier"),
        (GEMMA2, {"is_causal": False}, "is_causal"),
        (GEMMA2, {"sliding_window": None}, "sliding_window"),
        (GEMMA2, {"hidden_activation": "silu"}, "hidden_activation"),
        (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA2, {"layer_types": ["full_attention"]}, "layer_types"),
        (GEMMA2, {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(base, change, key):
    with pytest.raises(UnsupportedConfigError) as caught:
        build(base | change)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("family", "change", "key"),
    [
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "layer_types"),
        ("qwen2", {"use_sliding_window": False}, "layer_types"),
        ("gemma", {"hidden_act": "silu"}, "hidden_act"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "rope_scaling"),
        ("gemma3", {"rope_parameters": {"full_attention": {}, "factor": 8.0}}, "rope_parameters"),
        ("phi3", {"full_attn_mod": 2}, "full_attn_mod"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": [1, 0, 2]}, "no_rope_layers"),
        ("granite", {"shared_intermediate_size": 64}, "shared_intermediate_size"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm"),
        ("starcoder2", {"norm_type": "rms_norm"}, "norm_type"),
        ("starcoder2", {"mlp_type": "gated"}, "mlp_type"),
        ("starcoder2", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ("cohere2", {"rotary_pct": 0.5}, "rotary_pct"),
        *((f, {"sliding_window": None}, "sliding_window") for f in ("gemma2", "gemma3", "cohere2", "olmo3")),
        ("mixtral", {"n_shared_experts": 1}, "n_shared_experts"),
        ("qwen3-moe", {"mlp_only_layers": "none"}, "mlp_only_layers"),
    ],
)
def test_what_a_family_cannot_compute_is_refused_by_name(family, change, key, config_of):
    with pytest.raises(UnsupportedConfigError) as caught:
        build(config_of(family) | change)
    assert caught.value.key == key


def test_what_is_on_anyway_or_off_is_taken():
    """The negative control of the keys that are refused otherwise."""
    on = {"is_causal": True, "scale_attn_weights": True, "rotary_pct": 1.0, "logit_scale": 1.0}
    off = {"is_encoder_decoder": False, "add_cross_attention": False, "pruned_heads": {}, "logit_bias": 0}
    assert build(LLAMA | on | off) == build(LLAMA)
    assert build(LLAMA | dict.fromkeys(on)) == build(LLAMA)


def test_a_null_window_is_no_window_where_no_layer_has_one():
    spec = build(GEMMA2 | {"sliding_window": None, "layer_types": ["full_attention"] * 2})
    assert [layer.mixer.window for layer in spec.layers] == [None, None]
    silent = {key: value for key, value in GEMMA2.items() if key != "sliding_window"}
    assert build(silent).layers[0].mixer.window == Gemma2Config().sliding_window


def test_transformers_has_no_model_of_a_null_window_either():
    config = Gemma2Config(**GEMMA2 | {"sliding_window": None, "pad_token_id": None})
    theirs = Gemma2ForCausalLM(config)
    with pytest.raises(ValueError, match="sliding_window"):
        theirs(torch.zeros(1, 4, dtype=torch.long), use_cache=False)


def gguf_tensors() -> list[str]:
    return [parameter.source for parameter in build_model(LLAMA, "gguf")[1]]


def test_a_gguf_whose_tensors_are_all_read_is_taken():
    names = [*gguf_tensors(), "blk.0.attn_rot_embd.weight"]
    assert build_model(LLAMA, "gguf", tensors=names) == build_model(LLAMA, "gguf")


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_output.bias",
        "blk.1.attn_q.bias",
        "blk.0.ffn_down.bias",
        "output.bias",
        "blk.2.attn_q.weight",
    ],
)
def test_a_gguf_tensor_that_no_parameter_reads_is_refused_by_name(name):
    with pytest.raises(UnsupportedConfigError) as caught:
        build_model(LLAMA, "gguf", tensors=[*gguf_tensors(), name])
    assert caught.value.key == name
    assert name in caught.value.message


def test_a_tensor_that_no_parameter_reads_is_noticed():
    spec, parameters = build_model(LLAMA, "huggingface")
    names = [parameter.source for parameter in parameters]
    copies = ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert unread_tensors(spec, parameters, "huggingface", names + copies) == []
    assert unread_notices([], "llama") == ()
    others = [f"model.layers.{i}.self_attn.o_proj.bias" for i in range(1200)]
    unread = unread_tensors(spec, parameters, "huggingface", names + copies + others)
    assert unread == others
    (notice,) = unread_notices(unread, "llama")
    assert others[0] in notice
    assert "1,197 more" in notice
    assert len(notice) < 300
    untied, its = build_model(LLAMA | {"tie_word_embeddings": False}, "huggingface")
    other_head = ["vision.lm_head.weight"]
    assert unread_tensors(untied, its, "huggingface", other_head) == other_head


def test_a_key_of_a_nested_config_is_named_with_its_place(config_of):
    config = config_of("gemma3-vision")
    config["text_config"] = config["text_config"] | {"altup": 4}
    with pytest.raises(UnsupportedConfigError) as caught:
        build(config)
    assert caught.value.key == "text_config.altup"


def test_a_sparse_text_config_means_its_class_s_defaults():
    """What google/gemma-3-4b-it says of its text part."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
        "text_config": text,
    }
    spec, theirs = build(config), Gemma3TextConfig(**text)
    full, windowed = spec.layers[5].mixer, spec.layers[0].mixer
    assert [layer.mixer.window is None for layer in spec.layers] == [
        kind == "full_attention" for kind in theirs.layer_types
    ]
    assert (full.heads, full.kv_heads, full.head_dim) == (8, 4, 256)
    assert (full.rope.kind, full.rope.base, windowed.rope.kind, windowed.rope.base) == (
        *("linear", 1e6),
        *("default", 1e4),
    )
    assert (spec.vocab_size, spec.max_context_tokens, spec.tied_head) == (262_208, 131_072, True)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": None}, "model_type"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": "96"}, "vocab_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; expected a divisor of the 4"),
        ({"head_dim": 15}, "15 dims"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ],
)
def test_what_makes_no_sense_is_named(change, word):
    with pytest.raises(ModelFormatError, match=word):
        build(LLAMA | change)


def test_code_of_a_checkpoint_is_never_run():
    with pytest.raises(UnsafeFileError, match="never run"):
        build(LLAMA | {"model_type": "mine", "auto_map": {"AutoModel": "modeling.Mine"}})


@pytest.mark.parametrize("key", ["head_dim", "num_attention_heads", "num_hidden_layers"])
def test_a_huge_config_is_refused_at_once(key):
    started = time.perf_counter()
    with pytest.raises(ModelFormatError, match=key):
        build(LLAMA | {key: 1 << 30})
    assert time.perf_counter() - started < 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 40) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=JSON)
def test_any_value_of_any_key_is_taken_or_refused(family, data, value, config_of):
    config = config_of(family)
    key = data.draw(st.sampled_from([*sorted(config), "rope_scaling", "partial_rotary_factor"]))
    scaling = data.draw(st.sampled_from([None, "rope_type", "factor", "rope_theta"]))
    if scaling is not None:
        key, value = "rope_scaling", {"rope_type": "linear", "factor": 2.0, scaling: value}
    with suppress(IncompatibleModelError):
        build(config | {key: value})

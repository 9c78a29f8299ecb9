"""Changing any key of a family's config changes the logits as it does in transformers, or is refused, or changes
nothing in either: no key is decoration, and none that we call inert is not."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from octavo.errors import IncompatibleModelError
from octavo.models import build_model
from octavo.models.config_reader import _INERT

_ROPE = {"rope_type": "default", "rope_theta": 300.0}
_OTHER: dict[str, list[Any]] = {
    "vocab_size": [112],
    "hidden_size": [96],
    "intermediate_size": [80],
    "num_hidden_layers": [2],
    "num_attention_heads": [2],
    "num_key_value_heads": [1, 4],
    "head_dim": [32],
    "max_position_embeddings": [128],
    "original_max_position_embeddings": [32],
    "hidden_act": ["gelu", "silu", "relu"],
    "hidden_activation": ["silu"],
    "rms_norm_eps": [0.5],
    "layer_norm_eps": [0.5],
    "norm_epsilon": [0.5],
    "tie_word_embeddings": [True, False],
    "attention_bias": [True],
    "mlp_bias": [True],
    "use_bias": [False],
    "use_qkv_bias": [False],
    "sliding_window": [5, None],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 2],
    "layer_types": [["full_attention"] * 3, ["full_attention", "sliding_attention", "sliding_attention"]],
    "no_rope_layers": [[0, 1, 1]],
    "query_pre_attn_scalar": [60],
    "attn_logit_softcapping": [0.5],
    "final_logit_softcapping": [0.5],
    "use_bidirectional_attention": [True],
    "embedding_multiplier": [2.0],
    "residual_multiplier": [0.3],
    "attention_multiplier": [0.2],
    "logits_scaling": [2.0],
    "logit_scale": [0.1],
    "qk_layernorm": [True],
    "use_qk_norm": [True],
    "use_parallel_residual": [True],
    "num_experts_per_tok": [1],
    "num_local_experts": [4],
    "moe_intermediate_size": [24],
    "norm_topk_prob": [False],
    "decoder_sparse_step": [2],
    "mlp_only_layers": [[]],
    "rope_parameters": [_ROPE, {"full_attention": _ROPE, "sliding_attention": _ROPE}],
}
"""Key -> other values. Those that a config already has are left out."""

_LISTED = ("no_rope_layer_interval", "max_window_layers")
"""Mean nothing where a list says it for each layer."""
_FORMS = ("return_dict", "id2label", "label2id", "dtype")
"""Inert keys that are left as they are: they change the form of transformers' answer, or are no numbers."""


def changes(config: dict[str, Any]) -> list[tuple[str, Any]]:
    by_type = "full_attention" in config["rope_parameters"]
    return [
        (key, other)
        for key, value in config.items()
        for other in _OTHER.get(key, [])
        if other != value and (key != "rope_parameters" or ("full_attention" in other) == by_type)
    ]


def is_said(key: str, value: Any) -> bool:
    """Whether a config says anything with this key that could be changed."""
    return not key.startswith(("_", "transformers")) and value not in (None, {}, [], "")


def test_every_key_has_another_value_or_a_reason(family, config_of):
    if "vision" in family:
        return
    config = config_of(family)
    known = {*_OTHER, *_INERT, *_LISTED}
    off = {"is_encoder_decoder"}  # test_refusals.py has it on
    assert not {key for key, value in config.items() if is_said(key, value)} - known - off


def logits_of(config: PreTrainedConfig, weights: Any, ids: list[int]) -> torch.Tensor:
    """Of transformers' model of that config, on given weights."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.load_state_dict(weights)
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def test_a_changed_key_changes_what_it_changes_in_transformers(family, config_object, make, tiny, prompt_ids):
    if "vision" in family:  # a config within a config: that of Gemma 3 and of Mistral
        return
    # Longer than the length Phi-3 was trained on, beyond which ours is fixed.
    config, ids, computed = config_object(family), prompt_ids[:70], 0
    for key, other in changes(config.to_dict()):
        changed = config.to_dict() | {key: other}
        try:
            spec, _ = build_model(changed, "huggingface")
        except IncompatibleModelError:
            continue
        try:
            theirs = type(config).from_dict(changed)
        except Exception:  # they refuse it, with whatever error
            continue
        if spec == tiny(family).spec:
            logits = logits_of(theirs, tiny(family).theirs.state_dict(), ids)
            assert torch.equal(logits, tiny(family).their_logits(ids)), f"{key} = {other} is not read"
            continue
        model = make(theirs)
        expected = model.their_logits(ids)
        assert (model.our_logits(ids) - expected).norm() / expected.norm() < 3e-5, f"{key} = {other}"
        computed += 1
    assert computed >= 8


def test_inert_keys_change_nothing_in_transformers_either(family, config_object, tiny, prompt_ids):
    """All of those a config has at once, on the same weights."""
    config = config_object(family)
    if "vision" in family:
        return
    inert = {key: value for key, value in config.to_dict().items() if key in _INERT and key not in _FORMS}
    others = {
        key: not value if isinstance(value, bool) else value + (1 if isinstance(value, int) else 0.25)
        for key, value in inert.items()
        if isinstance(value, (bool, int, float))
    }
    assert {"initializer_range", "use_cache", "attention_dropout"} <= set(others)
    changed = config.to_dict() | others
    assert build_model(changed, "huggingface")[0] == build_model(config.to_dict(), "huggingface")[0]
    ids, model = prompt_ids[:40], tiny(family)
    logits = logits_of(type(config).from_dict(changed), model.theirs.state_dict(), ids)
    assert torch.equal(logits, model.their_logits(ids))

"""What each GGUF architecture's metadata mean in config.json's keys: one function an architecture.

Names and defaults are those of llama.cpp and of its converter, for which the files are written; where
metadata are silent, the tensors that are there decide, as they do there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from octavo.sources.gguf_metadata import MetadataReader
from octavo.sources.gguf_rope import rope_scaling

_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62
_RMS_EPS, _LAYERNORM_EPS = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"


def _llama(reader: MetadataReader) -> dict[str, Any]:
    config = _standard(reader) | {"attention_bias": _has_bias(reader, "attn_q")}
    experts = reader.raw("expert_count")
    if experts:
        return config | _experts(reader) | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    return config | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "mlp_bias": _has_bias(reader, "ffn_gate"),
    }


def _qwen2(reader: MetadataReader) -> dict[str, Any]:
    return _standard(reader) | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def _qwen3(reader: MetadataReader) -> dict[str, Any]:
    return _standard(reader) | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": _has_bias(reader, "attn_q"),
    }


def _qwen3moe(reader: MetadataReader) -> dict[str, Any]:
    return (
        _standard(reader)
        | _experts(reader)
        | {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": _has_bias(reader, "attn_q"),
            "moe_intermediate_size": reader.integer("expert_feed_forward_length"),
            "norm_topk_prob": True,
        }
    )


def _gemma(reader: MetadataReader) -> dict[str, Any]:
    return _standard(reader) | {
        "model_type": "gemma",
        "architectures": ["GemmaForCausalLM"],
        "attention_bias": _has_bias(reader, "attn_q"),
        "hidden_act": "gelu_pytorch_tanh",
    }


def _gemma2(reader: MetadataReader) -> dict[str, Any]:
    return _standard(reader) | {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": _has_bias(reader, "attn_q"),
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": reader.integer("attention.sliding_window", 4096),
        "attn_logit_softcapping": reader.number("attn_logit_softcapping", 50.0) or None,
        "final_logit_softcapping": reader.number("final_logit_softcapping", 30.0) or None,
        "query_pre_attn_scalar": _gemma_scalar(reader, _GEMMA2_27B_LAYERS),
    }


def _gemma3(reader: MetadataReader) -> dict[str, Any]:
    return (
        _standard(reader)
        | _windows(reader, every=6)
        | {
            "model_type": "gemma3_text",
            "architectures": ["Gemma3ForCausalLM"],
            "attention_bias": _has_bias(reader, "attn_q"),
            "hidden_activation": "gelu_pytorch_tanh",
            "final_logit_softcapping": reader.number("final_logit_softcapping", 0.0) or None,
            "query_pre_attn_scalar": _gemma_scalar(reader, _GEMMA3_27B_LAYERS),
            "rope_local_base_freq": reader.number("rope.freq_base_swa", 10000.0),
        }
    )


def _phi3(reader: MetadataReader) -> dict[str, Any]:
    original = reader.integer("rope.scaling.original_context_length", reader.integer("context_length"))
    return _standard(reader, partial_rotary=True) | {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "original_max_position_embeddings": original,
        "sliding_window": reader.raw("attention.sliding_window") or None,
    }


def _smollm3(reader: MetadataReader) -> dict[str, Any]:
    return _standard(reader) | {
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": _has_bias(reader, "attn_q"),
        "mlp_bias": _has_bias(reader, "ffn_gate"),
        "no_rope_layer_interval": 4,
    }


def _olmo2(reader: MetadataReader) -> dict[str, Any]:
    config = _standard(reader, writes_attention_factor=True)
    config["attention_bias"] = _has_bias(reader, "attn_q")
    if reader.raw("attention.sliding_window"):
        full = {"rope_theta": config.pop("rope_theta")} | config.pop("rope_scaling", {"rope_type": "default"})
        windowed_base = reader.number("rope.freq_base_swa", full["rope_theta"])
        windowed = {"rope_type": "default", "rope_theta": windowed_base}
        return (
            config
            | _windows(reader, every=4)
            | {
                "model_type": "olmo3",
                "architectures": ["Olmo3ForCausalLM"],
                "rope_parameters": {"full_attention": full, "sliding_attention": windowed},
            }
        )
    return config | {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}


def _granite(reader: MetadataReader) -> dict[str, Any]:
    if reader.raw("rope.scaling.finetuned") is False:
        raise reader.unsupported("rope.scaling.finetuned", "switches rope off in this architecture")
    config = _standard(reader)
    return config | {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "attention_bias": _has_bias(reader, "attn_q"),
        "mlp_bias": _has_bias(reader, "ffn_gate"),
        "attention_multiplier": reader.number("attention.scale", 0.0) or config["head_dim"] ** -0.5,
        "embedding_multiplier": reader.number("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": reader.number("residual_scale", 0.0) or 1.0,
        "logits_scaling": reader.number("logit_scale", 0.0) or 1.0,
    }


def _stablelm(reader: MetadataReader) -> dict[str, Any]:
    # The converter writes true where the original config is silent and means false: the tensors know better.
    reader.raw("use_parallel_residual")
    return _standard(reader, eps=_LAYERNORM_EPS, partial_rotary=True) | {
        "model_type": "stablelm",
        "architectures": ["StableLmForCausalLM"],
        "use_parallel_residual": not reader.has_tensor("blk.0.ffn_norm.weight"),
        "use_qkv_bias": _has_bias(reader, "attn_q"),
        "qk_layernorm": reader.has_tensor("blk.0.attn_q_norm.weight"),
    }


def _starcoder2(reader: MetadataReader) -> dict[str, Any]:
    config = _standard(reader, eps=_LAYERNORM_EPS)
    return config | {
        "model_type": "starcoder2",
        "architectures": ["Starcoder2ForCausalLM"],
        "norm_epsilon": config.pop("layer_norm_eps"),
        "use_bias": _has_bias(reader, "attn_q"),
        # The converter leaves it out; it is that of all published models.
        "sliding_window": reader.integer("attention.sliding_window", 4096),
    }


def _cohere2(reader: MetadataReader) -> dict[str, Any]:
    return (
        _standard(reader, eps=_LAYERNORM_EPS)
        | _windows(reader, every=4)
        | {
            "model_type": "cohere2",
            "architectures": ["Cohere2ForCausalLM"],
            "attention_bias": _has_bias(reader, "attn_q"),
            "logit_scale": reader.number("logit_scale"),
        }
    )


def _command_r(reader: MetadataReader) -> dict[str, Any]:
    return _standard(reader, eps=_LAYERNORM_EPS) | {
        "model_type": "cohere",
        "architectures": ["CohereForCausalLM"],
        "attention_bias": _has_bias(reader, "attn_q"),
        "use_qk_norm": reader.has_tensor("blk.0.attn_q_norm.weight"),
        "logit_scale": reader.number("logit_scale"),
    }


ARCHITECTURES: Mapping[str, Callable[[MetadataReader], dict[str, Any]]] = {
    "cohere2": _cohere2,
    "command-r": _command_r,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "granite": _granite,
    "llama": _llama,
    "olmo2": _olmo2,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "smollm3": _smollm3,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
}


def _standard(
    reader: MetadataReader,
    *,
    eps: str = _RMS_EPS,
    partial_rotary: bool = False,
    writes_attention_factor: bool = False,
) -> dict[str, Any]:
    """The keys that all families share; `eps` is where the norms' is."""
    hidden_size, heads = reader.integer("embedding_length"), reader.integer("attention.head_count")
    head_dim = reader.integer("attention.key_length", hidden_size // heads)
    rotary_dim = reader.integer("rope.dimension_count", head_dim)
    if reader.integer("attention.value_length", head_dim) != head_dim:
        raise reader.unsupported(
            "attention.value_length", f"differs from the {head_dim} dimensions of a head"
        )
    if rotary_dim != head_dim and not partial_rotary:
        raise reader.unsupported("rope.dimension_count", f"differs from the {head_dim} dimensions of a head")
    config: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_hidden_layers": reader.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": reader.integer("feed_forward_length"),
        "rms_norm_eps" if eps == _RMS_EPS else "layer_norm_eps": reader.number(eps),
        "max_position_embeddings": reader.integer("context_length"),
        "vocab_size": reader.vocab_size(),
        "rope_theta": reader.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": not reader.has_tensor("output.weight"),
    }
    if partial_rotary:
        config["partial_rotary_factor"] = _share(rotary_dim, head_dim)
    scaling = rope_scaling(
        reader,
        base=config["rope_theta"],
        pairs=rotary_dim // 2,
        context_tokens=config["max_position_embeddings"],
        writes_attention_factor=writes_attention_factor,
    )
    return config | ({"rope_scaling": scaling} if scaling else {})


def _experts(reader: MetadataReader) -> dict[str, Any]:
    return {
        "num_local_experts": reader.integer("expert_count"),
        "num_experts_per_tok": reader.integer("expert_used_count"),
    }


def _windows(reader: MetadataReader, *, every: int) -> dict[str, Any]:
    """Windowed layers: by a list, or all but each `every`th; none without a window."""
    count, window = reader.integer("block_count"), reader.raw("attention.sliding_window")
    pattern = reader.raw("attention.sliding_window_pattern")
    if isinstance(pattern, list) and len(pattern) != count:
        raise reader.malformed(
            "attention.sliding_window_pattern", pattern, f"one entry for each of {count} layers"
        )
    if not isinstance(pattern, list):
        every = every if pattern is None else reader.integer("attention.sliding_window_pattern")
        pattern = [bool((i + 1) % every) for i in range(count)]
    windowed = [bool(window) and bool(flag) for flag in pattern]
    config = {"layer_types": ["sliding_attention" if flag else "full_attention" for flag in windowed]}
    return config | ({"sliding_window": reader.integer("attention.sliding_window")} if window else {})


def _gemma_scalar(reader: MetadataReader, layers_of_27b: int) -> int:
    """llama.cpp's rule: scores are scaled by head_dim, but by hidden_size / heads in the 27B models."""
    hidden_size, heads = reader.integer("embedding_length"), reader.integer("attention.head_count")
    if reader.integer("block_count") == layers_of_27b:
        return hidden_size // heads
    return reader.integer("attention.key_length", hidden_size // heads)


def _has_bias(reader: MetadataReader, projection: str) -> bool:
    return reader.has_tensor(f"blk.0.{projection}.bias")


def _share(part: int, whole: int) -> float:
    """part / whole, such that int(whole * share) is the part again."""
    share = part / whole
    return share if int(whole * share) == part else math.nextafter(share, math.inf)

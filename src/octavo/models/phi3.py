"""Phi-3, 3.5 and 4: Llama with fused projections, rope over a part of each head, and LongRoPE."""

from __future__ import annotations

from dataclasses import replace

from octavo.models.config_reader import ConfigReader
from octavo.models.naming import PRE_NORMS, FamilyNames
from octavo.models.rope import Positions, read_positions
from octavo.models.spec import ModelSpec
from octavo.models.standard import read_layer, read_model, read_rms_norm, with_window

_QKV, _GATE_UP = dict.fromkeys(("mixer.q", "mixer.k", "mixer.v")), dict.fromkeys(("ffn.gate", "ffn.up"))
NAMES = FamilyNames(
    *PRE_NORMS,
    huggingface=dict.fromkeys(_QKV, "self_attn.qkv_proj") | dict.fromkeys(_GATE_UP, "mlp.gate_up_proj"),
    gguf=dict.fromkeys(_QKV, "attn_qkv") | dict.fromkeys(_GATE_UP, "ffn_up"),
)


def build(config: ConfigReader) -> ModelSpec:
    positions, norm = _read_positions(config), read_rms_norm(config, 1e-5)
    for key in ("full_attn_mod", "interpolate_factor"):
        # Phi-4-mini says 1, and nothing computes with it.
        if config.integer(key, 1) != 1:
            raise config.unsupported(key, "is not 1")
    layer = with_window(read_layer(config, positions, norm), config.optional_integer("sliding_window"))
    return read_model(config, "phi3", [layer] * config.layer_count(), positions, norm)


def _read_positions(config: ConfigReader) -> Positions:
    positions = read_positions(config, max_position=4096, partial=1.0)
    # The first checkpoints called LongRoPE "su", and later "yarn".
    kind = "longrope" if positions.kind in ("su", "yarn") else positions.kind
    original = config.integer("original_max_position_embeddings", 4096)
    return replace(positions, kind=kind, original_tokens=original)

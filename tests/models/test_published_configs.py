"""config.json files of models that people run, as published: read to the end, and meaning what they mean to
transformers.

Numbers and names only, without the ids and versions that nothing computes with; the folders are named by repository.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from octavo.models import build_model
from octavo.models.spec import ModelSpec

CONFIGS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("published_configs.json").read_text(encoding="utf-8")
)


def spec_of(config: dict[str, Any]) -> ModelSpec:
    return build_model(config, "huggingface")[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_means_what_it_means_to_transformers(name):
    config = CONFIGS[name]
    spec = spec_of(config)
    whole = AutoConfig.for_model(**config)
    theirs = whole.get_text_config()
    mixer = spec.layers[0].mixer
    assert len(spec.layers) == theirs.num_hidden_layers
    assert spec.vocab_size == theirs.vocab_size
    assert spec.hidden_size == theirs.hidden_size
    assert (mixer.heads, mixer.kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert mixer.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // mixer.heads)
    # transformers ties Mistral Small by default, and unties it when it finds a head in the checkpoint.
    assert spec.tied_head == (whole.tie_word_embeddings and config["model_type"] != "mistral3")
    assert spec.max_context_tokens >= theirs.max_position_embeddings
    window = getattr(theirs, "sliding_window", None)
    kinds = getattr(theirs, "layer_types", None) or [
        "full_attention" if window is None else "sliding_attention"
    ] * len(spec.layers)
    windows = [window if kind == "sliding_attention" else None for kind in kinds]
    if getattr(theirs, "use_sliding_window", True):
        assert [layer.mixer.window for layer in spec.layers] == windows
    else:
        assert not any(layer.mixer.window for layer in spec.layers)


def test_what_tools_sign_their_checkpoints_with_changes_nothing():
    config = CONFIGS["meta-llama/Llama-3.1-8B-Instruct"]
    signed = config | {"unsloth_fixed": True, "unsloth_version": "2024.9", "max_sequence_length": 2048}
    assert spec_of(signed) == spec_of(config)

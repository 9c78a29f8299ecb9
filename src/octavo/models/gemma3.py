"""The text part of Gemma 3's vision checkpoints: Gemma 3 under a prefix, its config under text_config.

The vision tower and the projector are left unread; images cannot be given to a text model.
"""

from __future__ import annotations

from dataclasses import replace

from octavo.models import gemma3_text
from octavo.models.config_reader import ConfigReader
from octavo.models.spec import ModelSpec

NAMES = replace(
    gemma3_text.NAMES,
    huggingface_roots=(
        ("language_model.model.", "language_model.lm_head"),
        ("model.language_model.", "lm_head"),
    ),
)
_OF_IMAGES = (
    *("vision_config", "mm_tokens_per_image", "image_token_index", "boi_token_index", "eoi_token_index"),
    *("image_token_id", "boi_token_id", "eoi_token_id"),
)


def build(config: ConfigReader) -> ModelSpec:
    for key in _OF_IMAGES:
        config.raw(key)
    text = config.nested("text_config")
    spec = gemma3_text.build(text)
    text.finish()
    return replace(spec, tied_head=config.flag("tie_word_embeddings", spec.tied_head))

"""The text part of Mistral Small 3.1 and 3.2, which also see: Mistral under a prefix, its config under text_config.

The vision tower and the projector are left unread; images cannot be given to a text model.
"""

from __future__ import annotations

from dataclasses import replace

from octavo.models import mistral
from octavo.models.config_reader import ConfigReader
from octavo.models.naming import TEXT_PART_ROOTS
from octavo.models.spec import ModelSpec
from octavo.models.standard import read_text_part

NAMES = replace(mistral.NAMES, huggingface_roots=TEXT_PART_ROOTS)
_OF_IMAGES = (
    *("image_token_index", "image_token_id", "multimodal_projector_bias", "projector_hidden_act"),
    *("spatial_merge_size", "vision_feature_layer"),
)


def build(config: ConfigReader) -> ModelSpec:
    return read_text_part(config, _OF_IMAGES, _build_text)


def _build_text(config: ConfigReader) -> ModelSpec:
    # Ministral 3, under the same name, scales its queries with the position.
    if config.text("model_type", "mistral") != "mistral":
        raise config.unsupported("model_type", "is not mistral")
    return mistral.build(config)

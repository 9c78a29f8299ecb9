"""The text part of Gemma 3's vision checkpoints: Gemma 3 under a prefix, its config under text_config.

The vision tower and the projector are left unread; images cannot be given to a text model.
"""

from __future__ import annotations

from dataclasses import replace

from octavo.models import gemma3_text
from octavo.models.config_reader import ConfigReader
from octavo.models.naming import TEXT_PART_ROOTS
from octavo.models.spec import ModelSpec
from octavo.models.standard import read_text_part

NAMES = replace(gemma3_text.NAMES, huggingface_roots=TEXT_PART_ROOTS)
_OF_IMAGES = (
    *("mm_tokens_per_image", "image_token_index", "boi_token_index", "eoi_token_index"),
    *("image_token_id", "boi_token_id", "eoi_token_id"),
)


def build(config: ConfigReader) -> ModelSpec:
    return read_text_part(config, _OF_IMAGES, gemma3_text.build)

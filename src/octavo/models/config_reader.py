"""Reading a Hugging Face config strictly: every key is used, known to change nothing, or an error.

A family takes the keys it understands; `finish` then refuses whatever is left that might change the
arithmetic. The price is that a new key needs a line here or in a family; the gain is that none is ever
silently ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from octavo.errors import ModelFormatError, UnsupportedConfigError
from octavo.models.spec import Activation

_INERT = frozenset(
    """
    architectures model_type auto_map name_or_path torch_dtype dtype use_cache initializer_range
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id unk_token_id
    attention_dropout hidden_dropout residual_dropout embedding_dropout embd_dropout resid_dropout dropout
    pretraining_tp id2label label2id problem_type task_specific_params
    is_decoder tie_encoder_decoder
    chunk_size_feed_forward output_attentions output_hidden_states output_scores return_dict
    return_dict_in_generate torchscript finetuning_task tokenizer_class prefix suffix
    do_sample early_stopping max_length min_length num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens use_bfloat16 tf_legacy_loss attn_implementation
    is_llama_config rope_interleaved cache_implementation
    embd_pdrop resid_pdrop output_router_logits router_aux_loss_coef router_jitter_noise
    unsloth_fixed unsloth_version max_sequence_length
    """.split()
)
"""Keys of training, generation defaults (read elsewhere) and bookkeeping. `rope_interleaved` and
`is_llama_config` stand in SmolLM2's config, `max_sequence_length` in early Llamas', and Unsloth signs what it saves;
transformers reads none of them."""

_ON: Mapping[str, object] = {
    "is_causal": True,
    "causal": True,
    "use_causal_mask": True,
    "scale_attn_weights": True,
    "use_rope": True,
    "rotary_pct": 1,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "logits_scaling": 1,
    "logit_scale": 1,
}
"""Keys that change nothing with this value, where a family does not take them: off is not neutral for these.
transformers makes every family's attention run both ways where `is_causal` is false."""


MAX_HEADS = MAX_HEAD_DIM = 1 << 14
MAX_LAYERS = MAX_EXPERTS = 1 << 10
"""Far beyond any model: a config is read before anything can say whether it fits in memory."""


_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class ConfigReader:
    """One config, with a record of which keys were taken.

    Getters raise ModelFormatError where a key is missing or of the wrong type; `unsupported` makes the
    error for a value we cannot say in a ModelSpec. `context_tokens` is the context that was asked for, if any:
    some rope scalings depend on it.
    """

    def __init__(
        self, config: Mapping[str, Any], family: str, *, context_tokens: int | None = None, within: str = ""
    ) -> None:
        self._config = config
        self._family = family
        self.context_tokens = context_tokens
        self._within = within
        self._taken: set[str] = set()

    def nested(self, key: str) -> ConfigReader:
        """A reader of its own, to be finished too, of the object at `key`."""
        value = self.raw(key)
        if not isinstance(value, Mapping):
            raise self._malformed(key, value, "an object")
        return self.beneath(key, value)

    def beneath(self, key: str, config: Mapping[str, Any]) -> ConfigReader:
        """A reader of its own, to be finished too, of an object that stands at `key`."""
        within = f"{self._within}{key}."
        return ConfigReader(config, self._family, context_tokens=self.context_tokens, within=within)

    def has(self, key: str) -> bool:
        """Present and not null."""
        return self._config.get(key) is not None

    def raw(self, key: str, default: Any = None) -> Any:
        self._taken.add(key)
        value = self._config.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = 1 << 31) -> int:
        value = self.raw(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._malformed(key, value, f"a whole number from {least} to {most}")
        return value

    def optional_integer(self, key: str, default: int | None = None) -> int | None:
        """`default` where the key is missing, None where it says null."""
        return None if self._is_null(key, default) else self.integer(key, default)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._malformed(key, value, "a finite number")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if value <= 0:
            raise self._malformed(key, value, "a number above 0")
        return value

    def optional_positive(self, key: str, default: float | None = None) -> float | None:
        """`default` where the key is missing, None where it says null."""
        return None if self._is_null(key, default) else self.positive(key, default)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw(key, default)
        if not isinstance(value, bool):
            raise self._malformed(key, value, "true or false")
        return value

    def positives(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` numbers above 0."""
        value = self.raw(key)
        numbers = value if isinstance(value, list) and len(value) == count else [None]
        if not all(isinstance(n, (int, float)) and 0 < n < math.inf for n in numbers):
            raise self._malformed(key, value, f"a list of {count} numbers above 0")
        return tuple(map(float, numbers))

    def text(self, key: str, default: str | None = None) -> str:
        value = self.raw(key, default)
        if not isinstance(value, str):
            raise self._malformed(key, value, "a string")
        return value

    def heads(self, heads: int | None = None, kv_heads: int | None = None) -> tuple[int, int]:
        """Query heads, and the kv heads that they share evenly; by default as given, and one a query head."""
        heads = self.integer("num_attention_heads", heads, most=MAX_HEADS)
        kv_heads = self.integer("num_key_value_heads", kv_heads or heads, most=MAX_HEADS)
        if heads % kv_heads:
            raise self._malformed(
                "num_key_value_heads", kv_heads, f"a divisor of the {heads} attention heads"
            )
        return heads, kv_heads

    def head_dim(self, default: int) -> int:
        return self.integer("head_dim", default, most=MAX_HEAD_DIM)

    def layer_count(self, default: int | None = None) -> int:
        return self.integer("num_hidden_layers", default, most=MAX_LAYERS)

    def activation(self, key: str = "hidden_act", default: str = "silu") -> Activation:
        name = self.text(key, default)
        if name not in _ACTIVATIONS:
            raise self.unsupported(key, f"is not one of {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name]

    def unsupported(self, key: str, why: str) -> UnsupportedConfigError:
        return UnsupportedConfigError(
            f"{self._family} config: {self._within}{key} = {self._config.get(key)!r:.200} {why}",
            remedy="Octavo refuses what it cannot compute exactly; choose a checkpoint without this feature.",
            key=self._within + key,
        )

    def finish(self) -> None:
        """Raise UnsupportedConfigError naming the first key nobody took that could change the result."""
        for key, value in self._config.items():
            known = key in self._taken or key in _INERT or key.startswith(("_", "transformers"))
            # A feature that is switched off (null, false, 0, empty) changes nothing, but for those of _ON.
            neutral = (None, _ON[key]) if key in _ON else (None, False, 0, "", [], {})
            if not known and value not in neutral:
                raise self.unsupported(key, "is not a key this family is known to compute with")

    def _is_null(self, key: str, default: float | None) -> bool:
        self._taken.add(key)
        return self._config.get(key, default) is None

    def _malformed(self, key: str, value: object, expected: str) -> ModelFormatError:
        found = "is missing" if value is None else f"is {value!r:.80}"
        return ModelFormatError(
            f"{self._family} config: {self._within}{key} {found}; expected {expected}",
            remedy="Fetch the checkpoint again, or compare its config.json with the original.",
        )

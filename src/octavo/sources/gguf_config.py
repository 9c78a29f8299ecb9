"""The config of a GGUF file in Hugging Face's words: what config.json and generation_config.json would say.

Keys: docs/gguf.md of ggml. Where metadata are silent, llama.cpp's defaults hold, since the files are
written for it. Every `<architecture>.*` key is translated, known to change nothing, or an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from octavo.errors import ModelFormatError, UnsupportedConfigError
from octavo.sources.files import FETCH_AGAIN
from octavo.sources.gguf import GGUFFile, GGUFTensor

ROPE_FACTORS = "rope_freqs.weight"
"""One divisor a rotary frequency: how llama.cpp stores Llama 3's rope scaling."""
_INERT = frozenset({"tensor_data_layout", "rope.scaling.finetuned", "vocab_size"})
_NEUTRAL: tuple[Any, ...] = (None, False, 0, "", [])
_GEMMA2_27B_LAYERS = 46


def config_from_gguf(gguf: GGUFFile) -> dict[str, Any]:
    """config.json of the model in `gguf`.

    Raises UnsupportedConfigError (naming the key) for an architecture or feature we cannot translate, and
    ModelFormatError for a value that is missing or malformed.
    """
    architecture = str(gguf.metadata.get("general.architecture"))
    if gguf.metadata.get("general.type") == "adapter":
        raise UnsupportedConfigError(
            f"{gguf.path} is an adapter, not a model",
            remedy="Name the GGUF file of the model it was trained on.",
            key="general.type",
        )
    if architecture not in _ARCHITECTURES:
        raise UnsupportedConfigError(
            f"{gguf.path} has the architecture {architecture!r:.60}, which cannot be read from GGUF "
            f"(supported: {', '.join(_ARCHITECTURES)})",
            remedy="Choose a model of a supported architecture.",
            key="general.architecture",
        )
    reader = _Reader(gguf, architecture)
    config = _shared(reader) | _ARCHITECTURES[architecture](reader)
    reader.finish()
    return {"model_type": architecture} | config


def generation_config_from_gguf(metadata: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """generation_config.json of the model: start, stop and padding ids, and recommended sampling.

    `eos_token_id` lists every id that ends an answer: end of text, of turn, of message. Ids outside the
    vocabulary are "none" in some files, and left out as llama.cpp does.
    """
    result: dict[str, Any] = {}

    def token(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int and 0 <= value < vocab_size else None

    for key, name in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        if (value := token(name)) is not None:
            result[key] = value
    stops = [value for name in ("eos", "eot", "eom") if (value := token(name)) is not None]
    if stops:
        result["eos_token_id"] = list(dict.fromkeys(stops))
    for key, name in _SAMPLING.items():
        if (value := metadata.get(f"general.sampling.{name}")) is not None:
            result[key] = _shortest(value)
    return result


_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


class _Reader:
    """The metadata of one architecture, with a record of the keys that were asked for."""

    def __init__(self, gguf: GGUFFile, architecture: str) -> None:
        self.gguf = gguf
        self.architecture = architecture
        self._taken: set[str] = set()

    def raw(self, key: str) -> Any:
        self._taken.add(key)
        return self.gguf.metadata.get(f"{self.architecture}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.raw(key)
        value = default if value is None else value
        if isinstance(value, list):
            raise self.unsupported(key, "differs between layers")
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise self.malformed(key, value, "a whole number from 1 to 2,147,483,647")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The shortest decimal that is the stored float32: 1e-05, not 9.999999747378752e-06."""
        value = self.raw(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.malformed(key, value, "a finite number")
        return float(_shortest(value))

    def has_tensor(self, name: str) -> bool:
        return name in self.gguf.tensors

    def vocab_size(self) -> int:
        """The width of the logits: rows of the token table, which may exceed the tokenizer's tokens."""
        table = self.gguf.tensors.get("token_embd.weight")
        if table is None:
            raise ModelFormatError(
                f"{self.gguf.path} has no token_embd.weight: it holds no language model, or a part of one",
                remedy="Name the file with the model's weights.",
            )
        return table.shape[0]

    def finish(self) -> None:
        prefix = self.architecture + "."
        for name, value in self.gguf.metadata.items():
            key = name.removeprefix(prefix)
            if name.startswith(prefix) and key not in self._taken | _INERT and value not in _NEUTRAL:
                raise self.unsupported(key, "is not a key this architecture is known to compute with")

    def unsupported(self, key: str, why: str) -> UnsupportedConfigError:
        name = f"{self.architecture}.{key}"
        return UnsupportedConfigError(
            f"{self.gguf.path}: {name} = {self.gguf.metadata.get(name)!r:.80} {why}",
            remedy="Octavo refuses what it cannot compute exactly; choose a model without this feature.",
            key=name,
        )

    def malformed(self, key: str, value: object, expected: str) -> ModelFormatError:
        found = "is missing" if value is None else f"is {value!r:.80}"
        return ModelFormatError(
            f"{self.gguf.path}: {self.architecture}.{key} {found}; expected {expected}", remedy=FETCH_AGAIN
        )


def _shared(reader: _Reader) -> dict[str, Any]:
    hidden_size, heads = reader.integer("embedding_length"), reader.integer("attention.head_count")
    head_dim = reader.integer("attention.key_length", hidden_size // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if reader.integer(key, head_dim) != head_dim:
            raise reader.unsupported(key, f"differs from the {head_dim} dimensions of a head")
    config = {
        "hidden_size": hidden_size,
        "num_hidden_layers": reader.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": reader.integer("feed_forward_length"),
        "rms_norm_eps": reader.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": reader.integer("context_length"),
        "vocab_size": reader.vocab_size(),
        "rope_theta": reader.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": not reader.has_tensor("output.weight"),
        "attention_bias": reader.has_tensor("blk.0.attn_q.bias"),
    }
    scaling = _rope_scaling(reader, config)
    return config | ({"rope_scaling": scaling} if scaling else {})


def _llama(reader: _Reader) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "mlp_bias": reader.has_tensor("blk.0.ffn_gate.bias"),
    }


def _gemma2(reader: _Reader) -> dict[str, Any]:
    # llama.cpp's rule: scores are scaled by head_dim, but by hidden_size / heads in the 27B model.
    is_27b = reader.integer("block_count") == _GEMMA2_27B_LAYERS
    hidden_size, heads = reader.integer("embedding_length"), reader.integer("attention.head_count")
    head_dim = reader.integer("attention.key_length", hidden_size // heads)
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": reader.integer("attention.sliding_window", 4096),
        "attn_logit_softcapping": reader.number("attn_logit_softcapping", 50.0) or None,
        "final_logit_softcapping": reader.number("final_logit_softcapping", 30.0) or None,
        "query_pre_attn_scalar": hidden_size // heads if is_27b else head_dim,
    }


_ARCHITECTURES: Mapping[str, Callable[[_Reader], dict[str, Any]]] = {"gemma2": _gemma2, "llama": _llama}


def _rope_scaling(reader: _Reader, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling` from rope.scaling.* and the rope factors tensor. Kind "linear" is llama.cpp's default."""
    kind = reader.raw("rope.scaling.type") or "linear"
    factor = reader.number("rope.scaling.factor", 0.0) or reader.number("rope.scale_linear", 0.0)
    original = reader.raw("rope.scaling.original_context_length")
    if reader.number("rope.scaling.attn_factor", 1.0) != 1.0:
        raise reader.unsupported("rope.scaling.attn_factor", "is not 1")
    yarn = {key: reader.number(f"rope.scaling.yarn_{key}", default) for key, default in _YARN.items()}
    scaled = kind != "none" and factor not in (0.0, 1.0)
    tensor = reader.gguf.tensors.get(ROPE_FACTORS)
    if tensor is not None:
        if scaled:
            raise reader.unsupported("rope.scaling.factor", f"stands beside a tensor {ROPE_FACTORS}")
        return _from_factors(reader, tensor, config)
    if not scaled:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise reader.unsupported("rope.scaling.type", "is a rope scaling that cannot be read from GGUF")
    for key in ("ext_factor", "attn_factor"):
        if yarn.pop(key) != 1.0:
            raise reader.unsupported(f"rope.scaling.yarn_{key}", "is not 1")
    original = config["max_position_embeddings"] if original is None else original
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original} | yarn


_YARN = {"ext_factor": 1.0, "attn_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}


def _from_factors(reader: _Reader, tensor: GGUFTensor, config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling if the factors are those llama.cpp's converter writes for it, else the factors.

    All Llama 3 models have the same parameters but for the factor, which is the largest divisor. Others
    are said as longrope with one list for both lengths, which divides the frequencies in the same way.
    """
    pairs = config["head_dim"] // 2
    if tensor.dtype != "f32" or tensor.shape != (pairs,):
        raise ModelFormatError(
            f"{reader.gguf.path}: {ROPE_FACTORS} is {tensor.dtype} of shape {tensor.shape}; expected f32 of ({pairs},)",
            remedy=FETCH_AGAIN,
        )
    factors = tensor.read().astype(np.float64)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ModelFormatError(
            f"{reader.gguf.path}: {ROPE_FACTORS} has values that are no divisors", remedy=FETCH_AGAIN
        )
    wavelengths = 2 * math.pi * config["rope_theta"] ** (np.arange(pairs) / pairs)
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    factor = float(_shortest(factors.max()))
    # 1e-4, because the converter computes in float32, whose rounding grows with the square of the factor.
    kept = np.clip((8192 / wavelengths - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    if np.allclose(factors, 1 / ((1 - kept) / factor + kept), rtol=1e-4, atol=0):
        return {"rope_type": "llama3", "factor": factor} | llama3
    divisors = [_shortest(value) for value in factors.tolist()]
    return {
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": divisors,
        "original_max_position_embeddings": config["max_position_embeddings"],
        "factor": 1.0,
        "attention_factor": 1.0,
    }


def _shortest(value: Any) -> Any:
    """A float32 as the shortest decimal that rounds to it; other values as they are."""
    return float(str(np.float32(value))) if isinstance(value, float) else value

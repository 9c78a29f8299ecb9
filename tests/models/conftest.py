"""Tiny random transformers models of every family and structural feature, and our model on their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PixtralVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from octavo.models import build_model
from octavo.models.parameters import Parameter
from octavo.models.spec import KV_PAGE_TOKENS, ModelSpec
from octavo.packing import pack_parameter
from octavo.quant.plain import Plain
from octavo.runners.reference.kv_cache import KVCache
from octavo.runners.reference.model import ReferenceModel

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other

VOCABULARY = 96
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
}
_GEMMA: dict[str, Any] = _SMALL | {"head_dim": 24}
_GEMMA2: dict[str, Any] = _GEMMA | {
    "sliding_window": 16,
    "query_pre_attn_scalar": 20,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 1.5,
    "num_hidden_layers": 4,
}
_GEMMA3: dict[str, Any] = _GEMMA | {
    "sliding_window": 16,
    "query_pre_attn_scalar": 20,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
_LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.2, 1.9, 3.0, 4.5, 7.0, 11.0],
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
}
_GRANITE: dict[str, Any] = {
    "attention_multiplier": 0.4,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "logits_scaling": 4.0,
}
_TINY_VISION = SiglipVisionConfig(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=1,
    image_size=14,
    patch_size=7,
)
_TINY_PIXTRAL = PixtralVisionConfig(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=1,
    image_size=14,
    patch_size=7,
)
_EXPERTS: dict[str, Any] = {"num_local_experts": 6, "num_experts_per_tok": 2}
_QWEN3_MOE: dict[str, Any] = _SMALL | {
    "head_dim": 24,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
}

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SMALL),
    "mistral": MistralConfig(**_SMALL, sliding_window=16),
    "mistral3-vision": Mistral3Config(
        text_config=MistralConfig(**_SMALL, sliding_window=None), vision_config=_TINY_PIXTRAL
    ),
    "qwen2": Qwen2Config(**_SMALL, use_sliding_window=True, sliding_window=16, max_window_layers=1),
    "qwen3": Qwen3Config(**_SMALL, head_dim=24, tie_word_embeddings=True),
    "gemma": GemmaConfig(**_GEMMA),
    "gemma2": Gemma2Config(**_GEMMA2),
    "gemma3": Gemma3TextConfig(
        **_GEMMA3,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "gemma3-vision": Gemma3Config(
        text_config=Gemma3TextConfig(**_GEMMA3), vision_config=_TINY_VISION, mm_tokens_per_image=4
    ),
    "phi3": Phi3Config(**_SMALL, original_max_position_embeddings=64, rope_parameters=_LONGROPE),
    "smollm3": SmolLM3Config(**_SMALL, no_rope_layers=[1, 0, 1]),
    "olmo2": Olmo2Config(**_SMALL),
    "olmo3": Olmo3Config(
        **_SMALL,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": _YARN | {"rope_theta": 500000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "granite": GraniteConfig(**_SMALL, **_GRANITE),
    "stablelm": StableLmConfig(**_SMALL, use_qkv_bias=True),
    "starcoder2": Starcoder2Config(**_SMALL, sliding_window=16),
    "cohere": CohereConfig(**_SMALL, logit_scale=0.3),
    "cohere2": Cohere2Config(
        **_SMALL,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        logit_scale=0.3,
    ),
    "mixtral": MixtralConfig(**_SMALL, **_EXPERTS, sliding_window=16),
    "qwen3-moe": Qwen3MoeConfig(**_QWEN3_MOE, norm_topk_prob=True, mlp_only_layers=[1]),
}
"""One config a family, with what is its own switched on: through the whole of `LLM`, on both runners."""

STRUCTURES: dict[str, PreTrainedConfig] = {
    "llama-tied-mha": LlamaConfig(**_SMALL | {"num_key_value_heads": 4}, tie_word_embeddings=True),
    "llama-head-dim": LlamaConfig(**_SMALL, head_dim=40),
    "llama-biases": LlamaConfig(**_SMALL, attention_bias=True, mlp_bias=True),
    "llama-gelu": LlamaConfig(**_SMALL, hidden_act="gelu"),
    "llama-rope-linear": LlamaConfig(
        **_SMALL, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    ),
    "llama-rope-llama3": LlamaConfig(**_SMALL, rope_parameters=_LLAMA3_ROPE),
    "llama-rope-base": LlamaConfig(
        **_SMALL, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
    ),
    "qwen2-full": Qwen2Config(**_SMALL, rope_parameters=_YARN),
    "qwen3-bias": Qwen3Config(**_SMALL, head_dim=24, attention_bias=True),
    "gemma2-no-caps": Gemma2Config(
        **_GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    ),
    "gemma2-layer-types": Gemma2Config(
        **_GEMMA2,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    ),
    "gemma2-bias": Gemma2Config(**_GEMMA2, attention_bias=True),
    "gemma3-cap": Gemma3TextConfig(**_GEMMA3, final_logit_softcapping=1.5),
    "phi3-window": Phi3Config(**_SMALL, sliding_window=16),
    "smollm3-window": SmolLM3Config(
        **_SMALL, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=16, attention_bias=True
    ),
    "stablelm-parallel": StableLmConfig(**_SMALL, use_parallel_residual=True),
    "starcoder2-plain": Starcoder2Config(**_SMALL, use_bias=False, tie_word_embeddings=False),
    "cohere-bias": CohereConfig(**_SMALL, attention_bias=True),
    "qwen3-moe-every-other": Qwen3MoeConfig(**_QWEN3_MOE, decoder_sparse_step=2),
}
"""More structural features: logits only."""

CASES = FAMILIES | STRUCTURES


@dataclass(frozen=True)
class ArrayTensor:
    """A TensorRef over values in memory."""

    name: str
    values: np.ndarray

    dtype = "f32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def read(self) -> np.ndarray:
        return self.values


@dataclass(frozen=True)
class StateDictWeights:
    """The reference model's weights straight from a transformers state dict."""

    parameters: dict[str, Parameter]
    tensors: dict[str, ArrayTensor]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.parameters[name].shape

    def unpack(self, name: str) -> np.ndarray:
        return pack_parameter(self.parameters[name], self.tensors, Plain("f32"))["values"].reshape(
            self.shape(name)
        )

    def release(self, name: str) -> None:
        """The state dict is read again for each mutant."""


@dataclass(frozen=True)
class Tiny:
    """A transformers model and everything ours is built from."""

    theirs: PreTrainedModel
    spec: ModelSpec
    weights: StateDictWeights

    def ours(self, spec: ModelSpec | None = None) -> ReferenceModel:
        return ReferenceModel(
            spec or self.spec,
            self.weights,
            context_tokens=256,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )

    def their_logits(self, ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return self.theirs(torch.tensor([ids]), use_cache=False).logits[0]

    def our_logits(self, ids: list[int], spec: ModelSpec | None = None) -> torch.Tensor:
        """The whole prompt in one chunk, through pages in reverse order."""
        spec = spec or self.spec
        pages = -(-len(ids) // KV_PAGE_TOKENS)
        groups = len(spec.kv_groups)
        cache = KVCache(spec, [pages] * groups, torch.float32, torch.device("cpu"))
        model = self.ours(spec)
        with torch.inference_mode():
            spans = cache.spans([list(range(pages))[::-1]] * groups, 0, len(ids))
            return model.logits(model.forward(torch.tensor(ids), 0, spans, cache))


def make_tiny(config: PreTrainedConfig, context_tokens: int | None = None) -> Tiny:
    torch.manual_seed(sum(map(ord, config.to_json_string())))
    seeing = {Gemma3Config: Gemma3ForConditionalGeneration, Mistral3Config: Mistral3ForConditionalGeneration}
    if type(config) in seeing:
        theirs = seeing[type(config)]._from_config(config, attn_implementation="eager").eval()
    else:
        theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            # Larger than the usual initialization, so that softcaps, norms and biases all matter.
            parameter.normal_(0, 0.3 if parameter.ndim > 1 else 0.5)
            if parameter.ndim == 1:
                parameter.add_(0.7)
    tensors = {name: ArrayTensor(name, value.detach().numpy()) for name, value in theirs.state_dict().items()}
    spec, parameters = build_model(
        config.to_dict(), "huggingface", tensors=tensors, context_tokens=context_tokens
    )
    return Tiny(theirs, spec, StateDictWeights({p.name: p for p in parameters}, tensors))


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Tiny]:
    made: dict[str, Tiny] = {}

    def get(case: str) -> Tiny:
        if case not in made:
            made[case] = make_tiny(CASES[case])
        return made[case]

    return get


@pytest.fixture
def config_object() -> Callable[[str], PreTrainedConfig]:
    """The config of a case, as transformers has it."""
    return CASES.__getitem__


@pytest.fixture
def config_of() -> Callable[[str], dict[str, Any]]:
    """The config of a case, as a dict of the test's own."""
    return lambda case: CASES[case].to_dict()


@pytest.fixture(scope="session")
def make() -> Callable[..., Tiny]:
    """A fresh model of any config, with scalings fixed for a context."""
    return make_tiny


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument `case` runs for every case, with `family` for every family, unless it says which."""
    explicit = {str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize")}
    for name, values in (("case", CASES), ("family", FAMILIES)):
        if name in metafunc.fixturenames and name not in ",".join(explicit):
            metafunc.parametrize(name, values)


@pytest.fixture(scope="session")
def prompt_ids() -> list[int]:
    """Longer than any tiny window and than llama3's original length."""
    return np.random.default_rng(7).integers(0, VOCABULARY, 90).tolist()

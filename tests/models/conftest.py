"""Tiny random transformers models of every family and structural feature, and our model on their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedModel

from octavo.models import build_model
from octavo.models.parameters import Parameter
from octavo.models.spec import KV_PAGE_TOKENS, ModelSpec
from octavo.runners.reference.kv_cache import KVCache
from octavo.runners.reference.model import ReferenceModel

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other

VOCABULARY = 96
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_GEMMA2: dict[str, Any] = dict(
    _LLAMA,
    head_dim=24,
    sliding_window=16,
    query_pre_attn_scalar=20,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=1.5,
    num_hidden_layers=4,
)
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
CASES = {
    "llama": LlamaConfig(**_LLAMA),
    "llama-tied-mha": LlamaConfig(**{**_LLAMA, "num_key_value_heads": 4}, tie_word_embeddings=True),
    "llama-head-dim": LlamaConfig(**_LLAMA, head_dim=40),
    "llama-biases": LlamaConfig(**_LLAMA, attention_bias=True, mlp_bias=True),
    "llama-rope-linear": LlamaConfig(
        **_LLAMA, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    ),
    "llama-rope-llama3": LlamaConfig(**_LLAMA, rope_parameters=_LLAMA3_ROPE),
    "llama-rope-base": LlamaConfig(
        **_LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
    ),
    "gemma2": Gemma2Config(**_GEMMA2),
    "gemma2-no-caps": Gemma2Config(
        **{**_GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None}
    ),
    "gemma2-layer-types": Gemma2Config(
        **_GEMMA2,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    ),
    "gemma2-bias": Gemma2Config(**_GEMMA2, attention_bias=True),
}


@dataclass(frozen=True)
class StateDictWeights:
    """The reference model's weights straight from a transformers state dict."""

    parameters: dict[str, Parameter]
    state: dict[str, torch.Tensor]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.parameters[name].shape

    def unpack(self, name: str) -> np.ndarray:
        values = self.state[self.parameters[name].source].numpy()
        assert values.shape == self.parameters[name].shape
        return values

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


def make_tiny(case: str) -> Tiny:
    config = CASES[case]
    torch.manual_seed(sum(map(ord, case)))
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            # Larger than the usual initialization, so that softcaps, norms and biases all matter.
            parameter.normal_(0, 0.3 if parameter.ndim > 1 else 0.5)
            if parameter.ndim == 1:
                parameter.add_(0.7)
    raw = config.to_dict()
    spec, parameters = build_model(raw, "huggingface")
    state = {name: value.detach() for name, value in theirs.state_dict().items()}
    return Tiny(theirs, spec, StateDictWeights({p.name: p for p in parameters}, state))


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Tiny]:
    made: dict[str, Tiny] = {}

    def get(case: str) -> Tiny:
        if case not in made:
            made[case] = make_tiny(case)
        return made[case]

    return get


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    explicit = any("case" in str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize"))
    if "case" in metafunc.fixturenames and not explicit:
        metafunc.parametrize("case", CASES)


@pytest.fixture(scope="session")
def prompt_ids() -> list[int]:
    """Longer than any tiny window and than llama3's original length."""
    return np.random.default_rng(7).integers(0, VOCABULARY, 90).tolist()

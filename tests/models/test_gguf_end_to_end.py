"""GGUF files as llama.cpp's converter would write them, through the whole of `LLM`, against transformers.

The converter's conventions are written out here on their own, beside the tensor names of its gguf package: q and
k with rotary pairs adjacent for Llama and its kin, norms stored as 1 + w for Gemma, experts in stacks, rope
factors as tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from octavo import LLM, SamplingParams
from octavo.errors import UnsupportedConfigError

_ARCH = gguf.MODEL_ARCH
_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
_LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.2, 1.9, 3.0, 4.5, 7.0, 11.0],
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
}
_LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
_GEMMA: dict[str, Any] = _SIZES | {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 16}
_EXPERTS: dict[str, Any] = {"num_local_experts": 5, "num_experts_per_tok": 2}

CASES: dict[str, tuple[Any, PreTrainedConfig]] = {
    "llama": (_ARCH.LLAMA, LlamaConfig(**_SIZES)),
    "llama-biases": (_ARCH.LLAMA, LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True)),
    "llama3": (
        _ARCH.LLAMA,
        LlamaConfig(**_SIZES, head_dim=16, tie_word_embeddings=True, rope_parameters=_LLAMA3),
    ),
    "mistral": (_ARCH.LLAMA, MistralConfig(**_SIZES, sliding_window=None)),
    "mixtral": (_ARCH.LLAMA, MixtralConfig(**_SIZES, **_EXPERTS)),
    "qwen2": (_ARCH.QWEN2, Qwen2Config(**_SIZES)),
    "qwen2-yarn": (_ARCH.QWEN2, Qwen2Config(**_SIZES, rope_parameters=_YARN)),
    "qwen3": (_ARCH.QWEN3, Qwen3Config(**_SIZES, head_dim=24)),
    "qwen3-moe": (
        _ARCH.QWEN3MOE,
        Qwen3MoeConfig(
            **_SIZES,
            head_dim=24,
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=40,
            norm_topk_prob=True,
        ),
    ),
    "gemma": (_ARCH.GEMMA, GemmaConfig(**_SIZES, head_dim=24)),
    "gemma2": (
        _ARCH.GEMMA2,
        Gemma2Config(**_GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=1.5),
    ),
    "gemma3": (
        _ARCH.GEMMA3,
        Gemma3TextConfig(
            **_GEMMA | {"num_hidden_layers": 6},
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
    ),
    "phi3": (
        _ARCH.PHI3,
        Phi3Config(**_SIZES, original_max_position_embeddings=64, rope_parameters=_LONGROPE),
    ),
    "phi3-window": (
        _ARCH.PHI3,
        Phi3Config(**_SIZES, original_max_position_embeddings=256, sliding_window=16),
    ),
    "smollm3": (_ARCH.SMOLLM3, SmolLM3Config(**_SIZES | {"num_hidden_layers": 4})),
    "olmo2": (_ARCH.OLMO2, Olmo2Config(**_SIZES)),
    "olmo3": (
        _ARCH.OLMO2,
        Olmo3Config(
            **_SIZES,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "full_attention": _YARN | {"rope_theta": 500000.0, "attention_factor": 1.2},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
            },
        ),
    ),
    "granite": (
        _ARCH.GRANITE,
        GraniteConfig(
            **_SIZES,
            attention_multiplier=0.4,
            embedding_multiplier=3.0,
            residual_multiplier=0.6,
            logits_scaling=4.0,
        ),
    ),
    "stablelm": (_ARCH.STABLELM, StableLmConfig(**_SIZES, use_qkv_bias=True)),
    "stablelm-parallel": (_ARCH.STABLELM, StableLmConfig(**_SIZES, use_parallel_residual=True)),
    "starcoder2": (_ARCH.STARCODER2, Starcoder2Config(**_SIZES, sliding_window=4096)),
    "cohere2": (
        _ARCH.COHERE2,
        Cohere2Config(**_SIZES | {"num_hidden_layers": 4}, sliding_window=16, logit_scale=0.3),
    ),
    "cohere": (_ARCH.COMMAND_R, CohereConfig(**_SIZES, logit_scale=0.3)),
}
_PERMUTED = ("LlamaConfig", "MistralConfig", "MixtralConfig", "SmolLM3Config", "GraniteConfig")


def adjacent_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """[heads * D, ...] with halves (first, second) of each head -> pairs side by side."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def converted(config: Any, state: dict[str, torch.Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    """Names without experts' parts fused, and values as the converter stores them."""
    family = type(config).__name__
    for name, value in state.items():
        array = value.numpy().copy()
        if name.startswith("lm_head") and config.tie_word_embeddings:
            continue
        if family.startswith("Gemma") and name.endswith("norm.weight"):
            array += 1
        if family in _PERMUTED and ".q_proj." in name:
            array = adjacent_pairs(array, config.num_attention_heads)
        if family in _PERMUTED and ".k_proj." in name:
            array = adjacent_pairs(array, config.num_key_value_heads)
        if name.endswith("experts.gate_up_proj"):
            gate, up = np.split(array, 2, axis=1)
            stem = name.removesuffix("gate_up_proj")
            yield from ((f"{stem}gate_proj.weight", gate), (f"{stem}up_proj.weight", up))
        else:
            yield (f"{name}.weight" if name.endswith("experts.down_proj") else name), array


def add_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    full = rope.get("full_attention", rope)
    writer.add_rope_freq_base(full["rope_theta"])
    if "sliding_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    if full["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    elif full["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(full["factor"])
        writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
        if isinstance(config, Olmo3Config):
            writer.add_rope_scaling_attn_factors(full["attention_factor"])
    elif full["rope_type"] == "longrope":
        original = config.original_max_position_embeddings
        ratio = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(ratio) / math.log(original)))
        for name in ("long", "short"):
            factors = np.array(full[f"{name}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", factors)
    elif full["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(full, config.head_dim))


def llama3_divisors(rope: dict[str, Any], dim: int) -> np.ndarray:
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / dim)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def add_own_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    """What the converter writes for one architecture and not for others."""
    if isinstance(config, (Gemma2Config, Gemma3TextConfig)):
        writer.add_sliding_window(config.sliding_window)
        if isinstance(config, Gemma2Config):
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    elif isinstance(config, Phi3Config):
        writer.add_sliding_window(config.sliding_window or 0)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    elif isinstance(config, Olmo3Config):
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    elif isinstance(config, GraniteConfig):
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    elif isinstance(config, StableLmConfig):
        writer.add_parallel_residual(True)  # also where it is not: what a silent config becomes
    elif isinstance(config, (CohereConfig, Cohere2Config)):
        if isinstance(config, Cohere2Config):
            writer.add_sliding_window(config.sliding_window)
        writer.add_logit_scale(config.logit_scale)
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    elif isinstance(config, (MixtralConfig, Qwen3MoeConfig)):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if isinstance(config, Qwen3MoeConfig):
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)


_Q8_0 = gguf.GGMLQuantizationType.Q8_0


def apart(config: Any, name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """What older files have instead of a fused or stacked tensor."""
    stem = name.removesuffix(".weight")
    if stem.endswith("_exps"):
        for expert, matrix in enumerate(array):
            yield f"{stem.removesuffix('_exps')}.{expert}.weight", matrix
    elif stem.endswith("attn_qkv"):
        rows = (
            config.hidden_size
            // config.num_attention_heads
            * np.array([config.num_attention_heads, config.num_key_value_heads])
        )
        for part, matrix in zip("qkv", np.split(array, np.cumsum(rows)), strict=True):
            yield f"{stem.removesuffix('qkv')}{part}.weight", matrix
    else:
        yield name, array


def add_tensor(writer: gguf.GGUFWriter, name: str, array: np.ndarray, *, quantized: bool) -> None:
    if quantized and array.ndim > 1 and not name.endswith("ffn_gate_inp.weight"):
        writer.add_tensor(name, gguf.quants.quantize(array, _Q8_0), raw_dtype=_Q8_0)
    else:
        writer.add_tensor(name, array)


def write_gguf(
    path: Path,
    arch: Any,
    theirs: torch.nn.Module,
    *,
    quantized: bool = False,
    split_tensors: int = 0,
    old: bool = False,
    more: Mapping[str, np.ndarray] | None = None,
) -> None:
    config: Any = theirs.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], split_max_tensors=split_tensors)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        starcoder = isinstance(config, Starcoder2Config)
        writer.add_layer_norm_eps(config.norm_epsilon if starcoder else config.layer_norm_eps)
    if getattr(config, "head_dim", None):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    partial = config.rope_parameters.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(partial * head_dim))
    add_rope(writer, config)
    add_own_keys(writer, config)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, array in converted(config, theirs.state_dict()):
        stored_as = names.get_name(name, (".weight", ".bias"))
        assert stored_as is not None, name
        for part, values in apart(config, stored_as, array) if old else [(stored_as, array)]:
            add_tensor(writer, part, np.ascontiguousarray(values), quantized=quantized)
    for name, array in (more or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_transformers(case, make, prompt_ids, tmp_path):
    arch, config = CASES[case]
    model, path = make(config), tmp_path / "model.gguf"
    write_gguf(path, arch, model.theirs)
    logits = model.their_logits(prompt_ids)
    expected = logits.log_softmax(-1)[range(len(prompt_ids) - 1), prompt_ids[1:]]
    # The native runner keeps keys and values in 16 bits.
    for runner, rounding in (("reference", 1e-4), ("cpu", 0.03 * float(logits.std()))):
        settings: dict[str, Any] = {"device": "cpu", "cache": False, "context": 128, "threads": 1}
        with LLM(path, quant="none", runner=runner, **settings) as llm:
            scored = torch.tensor(llm.score(prompt_ids).logprobs)
        torch.testing.assert_close(scored, expected, rtol=1e-3, atol=rounding)


@pytest.mark.parametrize("case", ["phi3", "mixtral"])
@pytest.mark.parametrize("quantized", [False, True])
def test_files_of_older_converters_are_the_same_model(case, quantized, make, prompt_ids, tmp_path):
    """Projections that are not fused, experts that are not stacked."""
    arch, config = CASES[case]
    model, scores = make(config), []
    for name in ("new", "old"):
        path = tmp_path / f"{name}.gguf"
        write_gguf(path, arch, model.theirs, quantized=quantized, old=name == "old")
        with LLM(path, device="cpu", cache=False, context=128, threads=1, runner="reference") as llm:
            scores.append(llm.score(prompt_ids).logprobs)
    tensors = [
        {tensor.name for tensor in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("new", "old")
    ]
    assert tensors[0] != tensors[1]
    assert scores[0] == scores[1]


def test_a_bias_that_the_architecture_has_no_place_for_is_refused(make, tmp_path):
    """llama.cpp would add it; a file that we load without it would answer otherwise."""
    arch, config = CASES["llama"]
    path = tmp_path / "model.gguf"
    write_gguf(path, arch, make(config).theirs, more={"blk.0.attn_output.bias": np.ones(64, np.float32)})
    with pytest.raises(UnsupportedConfigError, match=r"blk\.0\.attn_output\.bias"):
        LLM(path, device="cpu", cache=False, context=128)


@pytest.mark.parametrize("case", ["llama", "phi3", "mixtral"])
def test_rows_of_quantized_tensors_keep_their_numbers(case, make, prompt_ids, tmp_path):
    """Permuted, fused and stacked rows of Q8_0, as stored: the scores of the dequantized weights."""
    arch, config = CASES[case]
    model, path = make(config), tmp_path / "model.gguf"
    write_gguf(path, arch, model.theirs, quantized=True)
    with torch.no_grad():
        for name, parameter in model.theirs.named_parameters():
            if parameter.ndim > 1 and not name.endswith("mlp.gate.weight"):
                codes = gguf.quants.quantize(parameter.numpy(), _Q8_0)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(codes, _Q8_0)))
    expected = model.their_logits(prompt_ids).log_softmax(-1)[range(len(prompt_ids) - 1), prompt_ids[1:]]
    settings: dict[str, Any] = {"device": "cpu", "cache": False, "context": 128, "threads": 1}
    with LLM(path, runner="reference", **settings) as llm:
        assert llm.info()["quant"].startswith("q8_0")
        scored = torch.tensor(llm.score(prompt_ids).logprobs)
    torch.testing.assert_close(scored, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("runner", ["reference", "cpu"])
def test_a_split_model_computes_what_the_whole_file_does(runner, make, prompt_ids, tmp_path):
    arch, config = CASES["llama3"]
    model = make(config)
    write_gguf(tmp_path / "whole.gguf", arch, model.theirs)
    write_gguf(tmp_path / "split.gguf", arch, model.theirs, split_tensors=7)
    greedy, scores, ids = SamplingParams(max_new_tokens=24, temperature=0, ignore_eos=True), [], []
    for name in ("whole.gguf", "split-00001-of-00003.gguf"):
        with LLM(tmp_path / name, quant="int8", device="cpu", runner=runner, context=256, threads=1) as llm:
            scores.append(llm.score(prompt_ids).logprobs)
            ids.append(llm.generate(prompt_ids, greedy).token_ids)
    assert scores[0] == scores[1]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 24


_LLAMA_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.mark.model
def test_the_default_model_is_the_one_transformers_computes(default_model_path):
    """Logits of the real file, dequantized by the gguf package, in transformers' Llama."""
    reader = gguf.GGUFReader(default_model_path)
    heads = {"attn_q": 9, "attn_k": 3}
    state = {}
    theirs_of = {ours: name for name, ours in _LLAMA_NAMES.items()}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            if parts[2] in heads:
                values = (
                    values.reshape(heads[parts[2]], -1, 2, values.shape[-1])
                    .swapaxes(1, 2)
                    .reshape(values.shape)
                )
            name = f"model.layers.{parts[1]}.{theirs_of[parts[2]]}.weight"
        else:
            name = f"{theirs_of[parts[0]]}.weight"
        state[name] = torch.from_numpy(np.ascontiguousarray(values))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        theirs = LlamaForCausalLM(config)
    theirs.load_state_dict(state, strict=True, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    prompt = [504, 3575, 282, 4649, 314, 7042, 30, 198, 1116, 33, *range(2000, 2080)]
    with torch.inference_mode():
        logits = theirs.eval()(torch.tensor([prompt]), use_cache=False).logits[0]
    expected = logits.log_softmax(-1)[range(len(prompt) - 1), prompt[1:]]
    del theirs
    for runner, tolerance in (("reference", 1e-3), ("cpu", 2e-2)):
        with LLM(default_model_path, device="cpu", runner=runner, context=256) as llm:  # auto: as stored
            scored = torch.tensor(llm.score(prompt).logprobs)
        torch.testing.assert_close(scored, expected, rtol=1e-4, atol=tolerance)

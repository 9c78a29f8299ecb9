"""A GGUF file as llama.cpp's converter would write it, through the whole of `LLM`, against transformers.

The converter's conventions are written out here on their own: names, q and k with rotary pairs adjacent for
Llama, norms stored as 1 + w for Gemma 2.
"""

from __future__ import annotations

import copy
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from octavo import LLM

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = {
    "llama": {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    "gemma2": {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}


def gguf_name(name: str, family: str) -> str:
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{ {**_NAMES, **_NORMS[family]}[rest] }.weight"


def adjacent_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """[heads * D, K] with halves (first, second) of each head -> pairs side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, theirs: torch.nn.Module, family: str) -> None:
    config = theirs.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if family == "gemma2":
        writer.add_sliding_window(config.sliding_window)
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    tied = config.tie_word_embeddings
    for name, value in theirs.state_dict().items():
        if name.startswith("lm_head") and tied:
            continue
        array = value.numpy().copy()
        if family == "gemma2" and "norm" in name:
            array += 1
        if family == "llama" and "q_proj" in name:
            array = adjacent_pairs(array, config.num_attention_heads)
        if family == "llama" and "k_proj" in name:
            array = adjacent_pairs(array, config.num_key_value_heads)
        writer.add_tensor(gguf_name(name, family), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", ["llama", "llama-tied-mha", "gemma2"])
@pytest.mark.parametrize("runner", ["reference", "cpu"])
def test_scores_are_those_of_transformers(case, runner, tiny, prompt_ids, tmp_path):
    theirs = tiny(case).theirs
    family = theirs.config.model_type
    if family == "gemma2":
        # llama.cpp's Gemma 2 takes the score scale from the head size; the tiny one says another.
        config = copy.deepcopy(theirs.config)
        config.query_pre_attn_scalar = config.head_dim
        theirs = type(theirs)(config)
        theirs.load_state_dict(tiny(case).theirs.state_dict())
    theirs.eval()
    path = tmp_path / "model.gguf"
    write_gguf(path, theirs, family)
    with torch.inference_mode():
        logits = theirs(torch.tensor([prompt_ids]), use_cache=False).logits[0]
    expected = logits.log_softmax(-1)[range(len(prompt_ids) - 1), prompt_ids[1:]]
    with LLM(path, quant="none", device="cpu", runner=runner, cache=False, context=128) as llm:
        scored = torch.tensor(llm.score(prompt_ids).logprobs)
    # The native runner keeps keys and values in 16 bits.
    torch.testing.assert_close(scored, expected, rtol=1e-3, atol=1e-4 if runner == "reference" else 3e-2)


@pytest.mark.model
def test_the_default_model_is_the_one_transformers_computes(default_model_path):
    """Logits of the real file, dequantized by the gguf package, in transformers' Llama."""
    reader = gguf.GGUFReader(default_model_path)
    heads = {"attn_q": 9, "attn_k": 3}
    state = {}
    theirs_of = {ours: name for name, ours in {**_NAMES, **_NORMS["llama"]}.items()}
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

"""A random checkpoint of a real shape as a user's folder would be: config, safetensors in shards, tokenizer.

Weights are normal, never zeros: zeros run faster. Texts mean nothing, the time they take does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from shapes import SHAPES, Shape
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

SHARD_BYTES = 4 << 30


def make_checkpoint(folder: Path, name: str, device: str = "cuda") -> None:
    """Writes `folder`. A folder that is there already and complete stays as it is."""
    if (folder / "tokenizer.json").exists():
        return
    shape = SHAPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(shape)), encoding="utf-8")
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(_shards(_tensors(shape, device)), 1):
        file = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    _write_tokenizer(folder, shape)


def config_of(shape: Shape) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model_type": "gemma2" if shape.gemma else "llama",
        "architectures": ["Gemma2ForCausalLM" if shape.gemma else "LlamaForCausalLM"],
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.fed,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": shape.rope_base,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if shape.gemma:
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": shape.head_dim,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        }
    return config


def _tensors(shape: Shape, device: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values in bf16 on the host."""

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, device=device) * columns**-0.5).bfloat16().cpu()

    def norm() -> torch.Tensor:
        # Gemma adds one to what is stored.
        return (0.1 * torch.randn(shape.hidden) + (0.0 if shape.gemma else 1.0)).bfloat16()

    mixed, kept = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    linears = (
        ("self_attn.q_proj", mixed, shape.hidden),
        ("self_attn.k_proj", kept, shape.hidden),
        ("self_attn.v_proj", kept, shape.hidden),
        ("self_attn.o_proj", shape.hidden, mixed),
        ("mlp.gate_proj", shape.fed, shape.hidden),
        ("mlp.up_proj", shape.fed, shape.hidden),
        ("mlp.down_proj", shape.hidden, shape.fed),
    )
    norms = ["input_layernorm", "post_attention_layernorm"]
    if shape.gemma:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    yield "model.embed_tokens.weight", matrix(shape.vocabulary, shape.hidden)
    for index in range(shape.layers):
        for part, rows, columns in linears:
            yield f"model.layers.{index}.{part}.weight", matrix(rows, columns)
        for name in norms:
            yield f"model.layers.{index}.{name}.weight", norm()
    yield "model.norm.weight", norm()
    if not shape.tied:
        yield "lm_head.weight", matrix(shape.vocabulary, shape.hidden)


def _shards(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    held = 0
    for name, tensor in tensors:
        if shard and held + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, held = {}, 0
        shard[name] = tensor
        held += tensor.nbytes
    yield shard


def _write_tokenizer(folder: Path, shape: Shape) -> None:
    """Bytes, and words that no text gives, up to the vocabulary's size."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    letters = sorted(ByteLevel.alphabet())
    fillers = [f"w{i}" for i in range(shape.vocabulary - len(special) - len(letters))]
    vocabulary = {token: index for index, token in enumerate([*special, *letters, *fillers])}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(special)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))

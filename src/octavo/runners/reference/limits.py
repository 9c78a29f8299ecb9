"""Bounds on the reference runner's temporaries, and the activation bytes they add up to. Imports no torch."""

from __future__ import annotations

from octavo.models.spec import ModelSpec, MoE
from octavo.runners.base import RunnerConfig
from octavo.runners.rotation import rotation_bytes

PROCESS_BYTES = 248 << 20
"""A process that has loaded torch, tokenizers and the command line, and no model: 157 MiB anonymous and 88 MiB of
libraries' pages, measured (Linux, Python 3.11, CPU build of torch 2.13, RssAnon and RssFile). A CUDA build that is
not used holds 140 MiB more, which the reserve has to cover."""

CUDA_PROCESS_BYTES = 448 << 20
"""The same with CUDA in use: 429 MiB measured on the host after a matrix product (torch 2.11, CUDA 13.0, H100).
On the card, kernels took 76 MiB beside what torch had reserved: the reserve covers them."""

SCORES_BLOCK_BYTES = 32 << 20
"""Most bytes of attention scores at once, or those of one query if that is more: queries are taken in blocks so
that long contexts cost no square."""

LOGITS_BLOCK_ROWS = 64
"""Rows of logits at once where every prompt row's are wanted."""


def activation_bytes(spec: ModelSpec, config: RunnerConfig) -> int:
    """Most bytes alive beside weights and KV in one step: one chunk's fp32 tensors, scores and logits."""
    tokens = min(config.prefill_chunk_tokens, config.context_tokens)
    widest = 0
    for layer in spec.layers:
        mixer, ffn = layer.mixer, layer.ffn
        projections = (mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim
        # Attention holds q, k, v before and after rope, its fp32 keys and values, and two copies of a block
        # of scores; the MLP holds gate, up, the activated gate and their product.
        keys = 2 * config.context_tokens * mixer.kv_heads * mixer.head_dim
        of_a_query = mixer.heads * config.context_tokens
        scores = 2 * min(max(SCORES_BLOCK_BYTES // 4, of_a_query), tokens * of_a_query)
        fed = 4 * ffn.hidden_size
        if isinstance(ffn, MoE):
            # At worst all tokens choose one expert: its inputs and outputs are copies, beside the router's rows.
            fed += 4 * spec.hidden_size + 3 * ffn.experts
        widest = max(widest, 2 * tokens * projections + keys + scores, tokens * fed)
    residual = 6 * tokens * spec.hidden_size
    logits = (3 * LOGITS_BLOCK_ROWS + config.max_slots) * spec.vocab_size
    return 4 * (residual + widest + logits) + rotation_bytes(spec, config.context_tokens)

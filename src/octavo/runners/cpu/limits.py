"""Sizes of a step on the native runner, for plans and for its allocations. Mirrors csrc/runner.cpp."""

from __future__ import annotations

from octavo.models.spec import KV_PAGE_TOKENS, Attention, DenseMLP, ModelSpec, MoE
from octavo.runners.base import RunnerConfig

_ROWS_AT_ONCE = 512
"""Most tokens computed together: beyond it nothing gets faster, and activations grow."""
_TARGET_ROWS = 16
_BLOCK_TOKENS = 4 * KV_PAGE_TOKENS
_QUERY_TILE = 48


PROCESS_BYTES = 53 << 20
"""A process with numpy, tokenizers and the command line, and no model nor torch: 23 MiB anonymous and 27 to 30 MiB of
libraries' pages, measured (Linux, Python 3.11, RssAnon and RssFile). A tokenizer comes on top."""


def row_capacity(config: RunnerConfig) -> int:
    """Rows of activations held: a larger batch is computed in parts, with the same results."""
    wanted = max(config.prefill_chunk_tokens, config.max_slots)
    return max(1, min(wanted, _ROWS_AT_ONCE, config.context_tokens * config.max_slots))


def kv_bytes(spec: ModelSpec, config: RunnerConfig) -> int:
    """Of all pages: float16 keys and values."""
    return sum(
        pages * KV_PAGE_TOKENS * 2 * 2 * spec.layers[layer].mixer.kv_heads * spec.layers[layer].mixer.head_dim
        for group, pages in zip(spec.kv_groups, config.kv_pages, strict=True)
        for layer in group.layers
    )


def activation_bytes(spec: ModelSpec, config: RunnerConfig, threads: int) -> int:
    """Most bytes of activations, logits and workspaces of a model that mixes two encodings of them."""
    projected = max((m.heads + 2 * m.kv_heads) * m.head_dim for m in _mixers(spec))
    mixed = max(m.heads * m.head_dim for m in _mixers(spec))
    heads = max(m.heads for m in _mixers(spec))
    feeds: list[DenseMLP | MoE] = [layer.ffn for layer in spec.layers]
    experts: list[MoE] = [ffn for ffn in feeds if isinstance(ffn, MoE)]
    fed = max((ffn.hidden_size for ffn in feeds if isinstance(ffn, DenseMLP)), default=0)
    expert_fed = max((ffn.hidden_size for ffn in experts), default=0)
    ropes = {m.rope for m in _mixers(spec) if m.rope is not None}
    angles = len(ropes) * max((rope.rotary_dim for rope in ropes), default=0)
    widest = max(spec.hidden_size, projected, fed, expert_fed)
    encoded = _encoded_row_bytes(widest)
    rows = row_capacity(config)
    shared = rows * (4 * (2 * spec.hidden_size + projected + mixed + fed + angles))
    shared += max(rows, _TARGET_ROWS) * encoded
    if any(layer.parallel for layer in spec.layers):
        shared += rows * 4 * spec.hidden_size
    entry, entries = 0, max((ffn.experts_per_token for ffn in experts), default=0)
    if experts:
        entry = _encoded_row_bytes(max(spec.hidden_size, expert_fed))
        shared += rows * entries * (4 * (spec.hidden_size + expert_fed) + entry)
        shared += rows * 4 * max(ffn.experts for ffn in experts)
    blocks = sum(-(-pages * KV_PAGE_TOKENS // _BLOCK_TOKENS) for pages in config.kv_pages) + config.max_slots
    most_blocks = config.max_slots * (config.context_tokens // _BLOCK_TOKENS + 1)
    partials = 6 * min(blocks, most_blocks) * (mixed + 2 * heads)
    logits = 4 * (config.max_slots + config.draft_rows + _TARGET_ROWS) * spec.vocab_size
    head_dim = max(m.head_dim for m in _mixers(spec))
    tile = 4 * _QUERY_TILE * (3 * head_dim + _BLOCK_TOKENS + 6)
    a_thread = 4 * (spec.hidden_size + 3 * widest + angles) + encoded + tile + 12 * spec.vocab_size
    a_thread += entries * entry + 4 * spec.hidden_size
    return shared + partials + logits + threads * a_thread


def _encoded_row_bytes(columns: int) -> int:
    """fp32, and int16 values with three numbers every 16 columns, each in its own memory: the two that take most.
    A model whose matrices have one format needs one."""
    padded = -(-columns // 64) * 64
    return 2 * padded + 12 * (padded // 16) + 4 * columns


def _mixers(spec: ModelSpec) -> list[Attention]:
    return [layer.mixer for layer in spec.layers]

"""Sizes of the CUDA runner, for plans and for its allocations. Imports no torch."""

from __future__ import annotations

from octavo.models.spec import DenseMLP, ModelSpec
from octavo.runners.base import RunnerConfig
from octavo.runners.rotation import rotation_bytes

DEQUANTIZED_BYTES = 128 << 20
"""Weights that are dequantized at once for a library's product: the largest linear of most models."""

FEW_ROWS = 64
"""Rows up to which `rows_linear` reads the packed weights; above, dequantizing them once is less work."""

INT8_BLOCK = 128
"""Columns of a prompt's activations that share a scale where they are rounded to int8."""

TARGET_ROWS = 64
"""Rows of logits at once where every prompt row's are wanted."""

LARGEST_BATCH = 128
"""Decoding sequences in one graph."""

DETERMINISTIC_ROWS = 64
"""Least rows of a step under `--deterministic`: tokens of a prompt at once."""

PARTIAL_SUMS = 8
"""Most shares that the columns of a decode batch's product are split into."""

_SPLIT_ROWS = 32768
"""Output rows, times shares, up to which they are split: beyond, a card has CTAs enough."""

LIBRARY_BYTES = 136 << 20
"""What loaded kernels and the libraries' own workspaces take of the card beside every tensor (measured, CUDA 13.0)."""

PROCESS_BYTES = 448 << 20
"""Host memory of a process with torch, its CUDA libraries and no model: as the reference runner's."""


def batch_buckets(max_slots: int) -> tuple[int, ...]:
    """Batch sizes that get a graph: one, and powers of two up to the first that holds every slot."""
    sizes = [1]
    while sizes[-1] < max_slots:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)


def deterministic_rows(max_slots: int) -> int:
    """Rows of every step where one arithmetic serves prompts, one sequence and many."""
    return max(DETERMINISTIC_ROWS, batch_buckets(max_slots)[-1])


def activation_bytes(spec: ModelSpec, config: RunnerConfig) -> int:
    """Most bytes beside weights and KV: a prefill chunk's tensors, and the buffers of all batch sizes."""
    tokens = min(config.prefill_chunk_tokens, config.context_tokens)
    widest = summed = 0
    for layer in spec.layers:
        mixer, ffn = layer.mixer, layer.ffn
        mixed = mixer.heads * mixer.head_dim
        projected = (mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim
        gated = not isinstance(ffn, DenseMLP) or ffn.gated  # others are declined, but asked for their size
        fed = ffn.hidden_size * (2 if gated else 1)
        widest = max(widest, 2 * projected + 5 * mixed, 2 * fed + 2 * ffn.hidden_size)
        products = (spec.hidden_size, projected, fed)
        summed = max(summed, sum(max(n, min(PARTIAL_SUMS * n, _SPLIT_ROWS)) for n in products))
    chunk = tokens * (widest + 8 * spec.hidden_size)  # h in fp32, x and y in 16 bits
    logits = 2 * 4 * TARGET_ROWS * spec.vocab_size  # rows are written while the ones before are still read
    rows = sum(batch_buckets(config.max_slots))
    if config.deterministic:
        rows = 2 * deterministic_rows(config.max_slots)  # of prompts, and of decoding sequences
    slots = config.max_slots * 4 * spec.vocab_size
    splits = 64 * max(layer.mixer.heads * (layer.mixer.head_dim + 1) for layer in spec.layers)
    decode = rows * 4 * (spec.vocab_size + splits + widest + summed)
    # Scores, mask and pieces of a row that is sampled; counts and biases of a slot, the spare one too.
    sampling = rows * int(4.25 * spec.vocab_size) + (config.max_slots + 1) * 8 * spec.vocab_size
    tables = rotation_bytes(spec, config.context_tokens)
    return DEQUANTIZED_BYTES + max(chunk, logits) + decode + sampling + slots + tables

"""A prefill chunk: many tokens of one sequence through the model, eagerly.

Linears of many rows dequantize a block of weights and leave the product to the library; of few, `rows_linear`.
Shape letters: T tokens, N output rows, C padded columns, V vocabulary.
"""

from __future__ import annotations

import torch

from octavo.models.spec import DenseMLP
from octavo.runners.cuda.decode import finish_logits
from octavo.runners.cuda.dequantize import dequantize
from octavo.runners.cuda.device_model import DeviceLayer, DeviceModel, Linear, Matrix
from octavo.runners.cuda.embedding import embed
from octavo.runners.cuda.feed_forward import feed_forward
from octavo.runners.cuda.kv_cache import LayerCache
from octavo.runners.cuda.layout import padded
from octavo.runners.cuda.limits import DEQUANTIZED_BYTES, FEW_ROWS
from octavo.runners.cuda.low_rank import Addends, add_low_rank
from octavo.runners.cuda.norm import join_residual
from octavo.runners.cuda.prefill_attention import prefill_attention
from octavo.runners.cuda.rotate import rotate
from octavo.runners.cuda.rows_linear import rows_linear


class ChunkModel:
    """The model over chunks. Holds one block of dequantized weights between calls, nothing else."""

    def __init__(
        self, model: DeviceModel, caches: tuple[LayerCache, ...], compute_dtype: torch.dtype
    ) -> None:
        self._model = model
        self._caches = caches
        self._dtype = compute_dtype
        self.addends: Addends = {}
        """Of the adapter that `forward` and `logits` apply: empty, none."""
        device = model.embedding.codes.device
        self._weights = torch.empty(
            DEQUANTIZED_BYTES // compute_dtype.itemsize, dtype=compute_dtype, device=device
        )

    @property
    def nbytes(self) -> int:
        return self._weights.nbytes

    def forward(self, token_ids: torch.Tensor, start: int, tables: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """int32 [T] at positions start.. -> fp32 [T, hidden] before the final norm; writes keys and values.

        `tables`: for each KV group int32 [pages of the sequence].
        """
        model, spec = self._model, self._model.spec
        tokens = token_ids.shape[0]
        h = torch.empty((tokens, spec.hidden_size), device=token_ids.device)
        x = torch.empty((tokens, padded(spec.hidden_size)), dtype=self._dtype, device=token_ids.device)
        embed(model.embedding, token_ids, None, h, spec.embedding_multiplier)
        y, post, multiplier = None, None, 1.0
        for layer, cache in zip(model.layers, self._caches, strict=True):
            scale = layer.spec.residual_multiplier
            join_residual(h, y, x, post=post, pre=layer.pre_mixer, multiplier=multiplier, pdl=False)
            y = self._attend(layer, cache, x, start, tables[cache.group])
            join_residual(h, y, x, post=layer.post_mixer, pre=layer.pre_ffn, multiplier=scale, pdl=False)
            y = self._feed(layer, x)
            post, multiplier = layer.post_ffn, scale
        join_residual(h, y, None, post=post, pre=None, multiplier=multiplier, pdl=False)
        return h

    def logits(self, h: torch.Tensor, out: torch.Tensor) -> None:
        """Hidden states [T, hidden] -> `out` fp32 [T, V]."""
        spec = self._model.spec
        x = torch.empty((h.shape[0], padded(spec.hidden_size)), dtype=self._dtype, device=h.device)
        join_residual(h, None, x, post=None, pre=self._model.final_norm, multiplier=1.0, pdl=False)
        self._linear(self._model.head, x, out)
        finish_logits(out, spec)

    def _attend(
        self, layer: DeviceLayer, cache: LayerCache, x: torch.Tensor, start: int, table: torch.Tensor
    ) -> torch.Tensor:
        mixer, tokens = layer.spec.mixer, x.shape[0]
        qkv = x.new_empty((tokens, layer.qkv.rows))
        self._linear(layer.qkv, x, qkv)
        width = mixer.heads * mixer.head_dim
        q = x.new_empty((tokens, width))
        rotate(layer, cache, qkv, q, table, start)
        del qkv
        mixed = (x.new_empty if padded(width) == width else x.new_zeros)((tokens, padded(width)))
        prefill_attention(mixer, cache, q, table, mixed, start)
        y = x.new_empty((tokens, layer.o.rows))
        self._linear(layer.o, mixed, y)
        return y

    def _feed(self, layer: DeviceLayer, x: torch.Tensor) -> torch.Tensor:
        ffn, tokens = layer.spec.ffn, x.shape[0]
        assert isinstance(ffn, DenseMLP), "others are declined"
        both = x.new_empty((tokens, layer.gate_up.rows))
        self._linear(layer.gate_up, x, both)
        width = padded(ffn.hidden_size)
        fed = (x.new_empty if width == ffn.hidden_size else x.new_zeros)((tokens, width))
        feed_forward(both, fed, ffn, shuffled=False, pdl=False)
        del both
        y = x.new_empty((tokens, layer.down.rows))
        self._linear(layer.down, fed, y)
        return y

    def _linear(self, linear: Linear, x: torch.Tensor, out: torch.Tensor) -> None:
        """x [T, C] -> `out` [T, N]."""
        first = 0
        for part in linear.parts:
            into = out[:, first : first + part.rows]
            if x.shape[0] <= FEW_ROWS:
                rows_linear(part, x, into)
            else:
                self._library_product(part, x, into)
            first += part.rows
        add_low_rank(linear, x, out, self.addends)

    def _library_product(self, matrix: Matrix, x: torch.Tensor, out: torch.Tensor) -> None:
        at_once = max(1, self._weights.numel() // matrix.columns)
        for first in range(0, matrix.rows, at_once):
            last = min(first + at_once, matrix.rows)
            weights = self._weights[: (last - first) * matrix.columns].view(last - first, matrix.columns)
            dequantize(matrix, first, last, weights)
            if out.dtype == x.dtype:
                torch.mm(x, weights.T, out=out[:, first:last])
            else:
                out[:, first:last] = torch.mm(x, weights.T)
        if matrix.bias is not None:
            out += matrix.bias

"""A prefill chunk: many tokens of one sequence through the model, eagerly.

Linears of many rows dequantize a block of weights and leave the product to the library, or, where `activations` is
int8, multiply integers (`int8_linear`); of few, `rows_linear`. Whoever makes an input writes it as its reader takes it.
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
from octavo.runners.cuda.int8_linear import int8_linear
from octavo.runners.cuda.kv_cache import LayerCache
from octavo.runners.cuda.layout import padded
from octavo.runners.cuda.limits import DEQUANTIZED_BYTES, FEW_ROWS, INT8_BLOCK
from octavo.runners.cuda.low_rank import Addends, add_low_rank
from octavo.runners.cuda.norm import join_residual
from octavo.runners.cuda.one_scale import one_scale
from octavo.runners.cuda.prefill_attention import prefill_attention
from octavo.runners.cuda.rotate import rotate
from octavo.runners.cuda.rounded import Rounded, dequantized, round_values
from octavo.runners.cuda.rows_linear import rows_linear
from octavo.settings import ActivationsName


class ChunkModel:
    """The model over chunks. Holds one block of dequantized weights between calls, nothing else."""

    def __init__(
        self,
        model: DeviceModel,
        caches: tuple[LayerCache, ...],
        compute_dtype: torch.dtype,
        *,
        activations: ActivationsName = "int16",
        descriptors: bool = False,
    ) -> None:
        """`activations` int8: of more than FEW_ROWS tokens, where weights are int8. `descriptors`: the card has
        them."""
        self._model = model
        self._caches = caches
        self._dtype = compute_dtype
        self._rounds = activations == "int8"
        self._descriptors = descriptors
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
        embed(model.embedding, token_ids, None, h, spec.embedding_multiplier)
        y, post, multiplier = None, None, 1.0
        for layer, cache in zip(model.layers, self._caches, strict=True):
            scale = layer.spec.residual_multiplier
            x = self._input_of(layer.qkv, h)
            join_residual(h, y, x, post=post, pre=layer.pre_mixer, multiplier=multiplier, pdl=False)
            y = self._attend(layer, cache, x, start, tables[cache.group])
            x = self._input_of(layer.gate_up, h)
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
        self,
        layer: DeviceLayer,
        cache: LayerCache,
        x: Rounded | torch.Tensor,
        start: int,
        table: torch.Tensor,
    ) -> torch.Tensor:
        mixer = layer.spec.mixer
        qkv = self._linear(layer.qkv, x)
        tokens, width = qkv.shape[0], mixer.heads * mixer.head_dim
        q = qkv.new_empty((tokens, width))
        rotate(layer, cache, qkv, q, table, start)
        del qkv
        mixed = (q.new_empty if padded(width) == width else q.new_zeros)((tokens, padded(width)))
        prefill_attention(mixer, cache, q, table, mixed, start)
        if not self._takes_rounded(layer.o, tokens):
            return self._linear(layer.o, mixed)
        rounded = Rounded.empty(tokens, layer.o.columns, INT8_BLOCK, mixed.device)
        round_values(mixed, rounded)
        return self._linear(layer.o, rounded)

    def _feed(self, layer: DeviceLayer, x: Rounded | torch.Tensor) -> torch.Tensor:
        ffn = layer.spec.ffn
        assert isinstance(ffn, DenseMLP), "others are declined"
        both = self._linear(layer.gate_up, x)
        fed = self._input_of(layer.down, both)
        feed_forward(both, fed, ffn, pdl=False)
        del both
        return self._linear(layer.down, fed)

    def _takes_rounded(self, linear: Linear, tokens: int) -> bool:
        return self._rounds and tokens > FEW_ROWS and linear.is_int8

    def _input_of(self, linear: Linear, like: torch.Tensor) -> Rounded | torch.Tensor:
        """A buffer for the linear's input: of as many tokens as `like`, and on its device."""
        tokens, device = like.shape[0], like.device
        if self._takes_rounded(linear, tokens):
            return Rounded.empty(tokens, linear.columns, INT8_BLOCK, device)
        return torch.empty((tokens, linear.columns), dtype=self._dtype, device=device)

    def _linear(
        self, linear: Linear, x: Rounded | torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [T, C] -> [T, N]."""
        tokens = x.values.shape[0] if isinstance(x, Rounded) else x.shape[0]
        if out is None:
            out = torch.empty((tokens, linear.rows), dtype=self._dtype, device=self._weights.device)
        first = 0
        for part in linear.parts:
            into = out[:, first : first + part.rows]
            if isinstance(x, Rounded):
                self._int8_product(part, x, into)
            elif tokens <= FEW_ROWS:
                rows_linear(part, x, into)
            else:
                self._library_product(part, x, into)
            first += part.rows
        if self.addends:
            values = dequantized(x, self._dtype) if isinstance(x, Rounded) else x
            add_low_rank(linear, values, out, self.addends)
        return out

    def _int8_product(self, matrix: Matrix, x: Rounded, out: torch.Tensor) -> None:
        codes, bias = matrix.elements.view(matrix.rows, matrix.columns), matrix.bias
        if matrix.encoding.group_size == 0:
            int8_linear(codes, matrix.scales, bias, x, out, descriptors=self._descriptors)
            return
        bytes_ = self._weights.view(torch.int8)
        # Scales lie behind the codes, on whole words.
        at_once = min(matrix.rows, bytes_.numel() // (matrix.columns + 4))
        codes = bytes_[: at_once * matrix.columns].view(at_once, matrix.columns)
        scales = bytes_[codes.numel() : codes.numel() + 4 * at_once].view(torch.float32)
        for first in range(0, matrix.rows, at_once):
            last = min(first + at_once, matrix.rows)
            rows = last - first
            one_scale(matrix, first, last, codes, scales)
            part = None if bias is None else bias[first:last]
            int8_linear(
                codes[:rows], scales[:rows], part, x, out[:, first:last], descriptors=self._descriptors
            )

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

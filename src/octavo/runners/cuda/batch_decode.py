"""One decode step of several sequences: as `decode` does for one, with tensor cores.

Linears of int8 codes take activations in fixed point (`planes_linear`), others in 16 bits (`rows_linear`). Whoever
makes an activation writes it as its reader takes it, and adds the partial sums of the product it reads.
Kernels, a layer: join_residual, qkv, attention, join_splits, o, join_residual, gate_up, feed_forward, down. In fixed
point gate_up gates by itself (`Gate`): it makes the input of down where that has scales of blocks, else quantize_rows.
Shape letters: B sequences, S partial sums, C padded columns, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from octavo.models.spec import DenseMLP
from octavo.runners.cuda.append_rows import append_rows
from octavo.runners.cuda.batch_attention import WalkTile, batch_attention, walk_tile_for
from octavo.runners.cuda.decode import Card, DecodeStep, finish_logits
from octavo.runners.cuda.decode_attention import Sequences
from octavo.runners.cuda.device_model import DeviceLayer, DeviceModel, Linear
from octavo.runners.cuda.embedding import embed
from octavo.runners.cuda.feed_forward import feed_forward
from octavo.runners.cuda.fixed_point import Planes
from octavo.runners.cuda.kv_cache import LayerCache
from octavo.runners.cuda.layout import CODE_BITS
from octavo.runners.cuda.low_rank import Adapters
from octavo.runners.cuda.norm import join_residual
from octavo.runners.cuda.pick import PIECE_TOKENS, best_of_rows, pick
from octavo.runners.cuda.planes_linear import Gate, PlanesTile, RowLogits, planes_linear
from octavo.runners.cuda.planes_tiles import planes_tile_for
from octavo.runners.cuda.quantize_rows import Unquantized, quantize_rows
from octavo.runners.cuda.rows_linear import RowsTile, rows_linear, rows_tile_for


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a linear is computed: in fixed point with a scale for so many columns of x, or (0) in 16 bits."""

    block_columns: int
    tile: PlanesTile | RowsTile


class BatchStep:
    """Buffers and launches for a batch of B rows. `logits` fp32 [B, V] and `sampled` int32 [B] are its results."""

    def __init__(
        self,
        model: DeviceModel,
        caches: tuple[LayerCache, ...],
        sequences: Sequences,
        last_tokens: torch.Tensor,
        *,
        context_tokens: int,
        compute_dtype: torch.dtype,
        card: Card,
        adapters: Adapters | None = None,
        appends_first: bool = False,
    ) -> None:
        """`adapters`: rows may have one. `appends_first`: keys and values of all rows before any attends, which may be
        of one sequence then."""
        self._model = model
        self._appends_first = appends_first
        self._adapters = adapters
        self._caches = caches
        self._sequences = sequences
        self._last_tokens = last_tokens
        self._card = card
        self._count = sequences.slots.shape[0]
        self._device = last_tokens.device
        self._slots: tuple[int, ...] = ()
        self._inputs: dict[tuple[int, int], Planes | torch.Tensor] = {}
        self._plans: dict[int, _Plan] = {}
        linears = [x for layer in model.layers for x in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        downs = {id(layer.down) for layer in model.layers}
        for linear in (*linears, model.head):
            plan = self._plan(linear, splitting=linear is not model.head, blocks=id(linear) in downs)
            self._plans[id(linear)] = plan
            key = linear.columns, plan.block_columns
            if key not in self._inputs:
                self._inputs[key] = self._input(*key, compute_dtype)
        spec = model.spec
        self._h = self._buffer(spec.hidden_size)
        self._y = self._buffer(max(self._partial(x) for x in linears if x.rows == spec.hidden_size))
        self._qkv = self._buffer(max(self._partial(layer.qkv) for layer in model.layers))
        self._both = self._buffer(max(self._unfed(layer) for layer in model.layers))
        self._largest = self._buffer(max(self._pieces_of(layer) for layer in model.layers))
        self.logits = self._buffer(spec.vocab_size)
        self.sampled = torch.zeros(self._count, dtype=torch.int32, device=self._device)
        mixers = [layer.mixer for layer in spec.layers]
        self._walks: tuple[WalkTile, ...] = tuple(
            walk_tile_for(mixer, self._count, context_tokens, card.multiprocessors) for mixer in mixers
        )
        splits = max(walk.splits for walk in self._walks)
        self._parts = self._buffer(splits * max(m.heads * m.head_dim for m in mixers))
        self._sums = self._buffer(splits * max(m.heads for m in mixers))
        head = self._plans[id(model.head)].tile
        self._best_in_passing = isinstance(head, PlanesTile) and adapters is None
        piece = head.rows if isinstance(head, PlanesTile) and self._best_in_passing else PIECE_TOKENS
        self._pieces = -(-spec.vocab_size // piece)
        self._best = self._buffer(self._pieces)
        self._best_ids = self._buffer(self._pieces, torch.int32)

    @property
    def nbytes(self) -> int:
        """Of the buffers."""
        tensors = [value for value in vars(self).values() if isinstance(value, torch.Tensor)]
        return sum(t.nbytes for t in (*tensors, *self._inputs.values()))

    def set_slots(self, slots: tuple[int, ...]) -> None:
        """Which slots the rows are; the rest of the batch goes to the spare one."""
        if slots == self._slots:
            return
        filled = [*slots, *[self._sequences.spare_slot] * (self._count - len(slots))]
        rows = torch.tensor(filled, dtype=torch.int32)
        # Pinned, since a copy from other memory waits for the stream; torch keeps the block until it is done.
        self._sequences.slots.copy_(rows.pin_memory() if self.sampled.is_cuda else rows, non_blocking=True)
        self._slots = slots

    def forward(self, *, head: bool = True) -> None:
        """Launch the model: logits from each slot's last token, unless not `head`; appends its keys and values."""
        model, spec, pdl = self._model, self._model.spec, self._card.pdl
        embed(model.embedding, self._last_tokens, self._sequences.slots, self._h, spec.embedding_multiplier)
        y, post, multiplier = None, None, 1.0
        for index, layer in enumerate(model.layers):
            scale = layer.spec.residual_multiplier
            x = self._input_of(layer.qkv)
            join_residual(self._h, y, x, post=post, pre=layer.pre_mixer, multiplier=multiplier, pdl=pdl)
            y = self._attend(index, layer)
            x = self._input_of(layer.gate_up)
            join_residual(self._h, y, x, post=layer.post_mixer, pre=layer.pre_ffn, multiplier=scale, pdl=pdl)
            y, post, multiplier = self._feed(layer), layer.post_ffn, scale
        if not head:
            return
        x = self._input_of(model.head)
        join_residual(self._h, y, x, post=post, pre=model.final_norm, multiplier=multiplier, pdl=pdl)
        self._project(x)

    def pick(self, told: torch.Tensor | None = None) -> None:
        """Launch greedy sampling of the logits; moves the slots on. `told`: `octavo.runners.cuda.pick.move_on`."""
        if not self._best_in_passing:
            best_of_rows(self.logits, self._best, self._best_ids)
        pick(
            self._best,
            self._best_ids,
            self._pieces,
            self._sequences,
            self.sampled,
            self._last_tokens,
            told,
            pdl=self._card.pdl and self._best_in_passing,
        )

    def _attend(self, index: int, layer: DeviceLayer) -> torch.Tensor:
        qkv = self._linear(layer.qkv, self._qkv)
        if self._appends_first:
            append_rows(layer, self._caches[index], qkv, self._sequences, pdl=self._card.pdl)
        batch_attention(
            layer,
            self._caches[index],
            qkv,
            self._sequences,
            self._parts,
            self._sums,
            self._input_of(layer.o),
            self._walks[index],
            appended=self._appends_first,
            pdl=self._card.pdl,
        )
        return self._linear(layer.o, self._y)

    def _feed(self, layer: DeviceLayer) -> torch.Tensor:
        ffn = layer.spec.ffn
        assert isinstance(ffn, DenseMLP), "others are declined"
        fed = self._input_of(layer.down)
        if self._gates(layer):
            (part,), x = layer.gate_up.parts, self._input_of(layer.gate_up)
            tile, pdl = self._plans[id(layer.gate_up)].tile, self._card.pdl
            assert isinstance(x, Planes)
            assert isinstance(fed, Planes)
            assert isinstance(tile, PlanesTile)
            if pieces := self._pieces_of(layer):
                values = _start(self._both, self._count, part.rows // 2)
                gated = Unquantized(values, _start(self._largest, self._count, pieces))
                planes_linear(part, x, Gate(ffn.activation, gated), tile, pdl=pdl, descriptors=pdl)
                quantize_rows(gated, fed, pdl=pdl)
            else:
                planes_linear(part, x, Gate(ffn.activation, fed), tile, pdl=pdl, descriptors=pdl)
        else:
            feed_forward(self._linear(layer.gate_up, self._both), fed, ffn, pdl=self._card.pdl)
        return self._linear(layer.down, self._y)

    def _gates(self, layer: DeviceLayer) -> bool:
        """Whether gate_up gates by itself."""
        ffn = layer.spec.ffn
        assert isinstance(ffn, DenseMLP), "others are declined"
        blocks = self._plans[id(layer.down)].block_columns
        plan = self._plans[id(layer.gate_up)]
        fixed = ffn.gated and len(layer.gate_up.parts) == 1 and isinstance(plan.tile, PlanesTile)
        fixed = fixed and self._adapters is None  # their addends come before the gate
        # Its CTAs write one while others still read the other.
        fixed = fixed and self._input_of(layer.gate_up) is not self._input_of(layer.down)
        return fixed and blocks > 0 and plan.tile.splits == 1

    def _pieces_of(self, layer: DeviceLayer) -> int:
        """Pieces in which gate_up leaves what it gated, where the scale is a token's; 0: it makes down's input."""
        tile = self._plans[id(layer.gate_up)].tile
        if not self._gates(layer) or self._plans[id(layer.down)].block_columns <= 64:
            return 0
        return -(-(layer.gate_up.rows // 2) // tile.rows)

    def _unfed(self, layer: DeviceLayer) -> int:
        """Columns of what gate_up leaves that is not yet down's input."""
        if self._gates(layer):
            return layer.gate_up.rows // 2 if self._pieces_of(layer) else 0
        return self._partial(layer.gate_up)

    def _project(self, x: Planes | torch.Tensor) -> None:
        spec, pdl = self._model.spec, self._card.pdl
        (head,) = self._model.head.parts
        tile = self._plans[id(self._model.head)].tile
        if self._adapters is not None:
            self._linear(self._model.head, self.logits)
            finish_logits(self.logits, spec)
        elif isinstance(tile, PlanesTile):
            assert isinstance(x, Planes)
            logits = RowLogits(spec.logits_multiplier, spec.final_softcap, self._best, self._best_ids)
            planes_linear(head, x, self.logits[None], tile, pdl=pdl, descriptors=pdl, logits=logits)
        else:
            assert isinstance(x, torch.Tensor)
            rows_linear(head, x, self.logits, tile)
            finish_logits(self.logits, spec)

    def _linear(self, linear: Linear, buffer: torch.Tensor) -> torch.Tensor:
        """Partial sums fp32 [S, B, N], at the start of `buffer`."""
        tile = self._plans[id(linear)].tile
        x, pdl = self._input_of(linear), self._card.pdl
        out = _start(buffer, tile.splits, self._count, linear.rows)
        first = 0
        for part in linear.parts:
            into = out[:, :, first : first + part.rows]
            if isinstance(x, Planes):
                assert isinstance(tile, PlanesTile)
                planes_linear(part, x, into, tile, pdl=pdl, descriptors=pdl)
            else:
                assert isinstance(tile, RowsTile)
                rows_linear(part, x, into, tile)
            first += part.rows
        if self._adapters is not None:
            self._adapters.add_rows(linear, x, out[0], self._sequences.slots)
        return out

    def _plan(self, linear: Linear, *, splitting: bool, blocks: bool) -> _Plan:
        block = planes_block(linear, self._count, blocks=blocks)
        size = linear.rows, linear.columns, self._count
        if block:
            card, group = self._card, linear.parts[0].encoding.group_size
            tile = planes_tile_for(card.name, card.multiprocessors, group, *size, splitting=splitting)
            return _Plan(block, tile)
        nibbles = all(CODE_BITS[part.encoding.codec] == 4 for part in linear.parts)
        multiprocessors = self._card.multiprocessors if splitting else 0
        return _Plan(0, rows_tile_for(*size, multiprocessors, nibbles=nibbles))

    def _input(self, columns: int, block_columns: int, dtype: torch.dtype) -> Planes | torch.Tensor:
        """A buffer for what linears of so many columns take; they are never alive together."""
        if not block_columns:
            return self._buffer(columns, dtype)
        pairs = self._buffer(2 * columns, torch.int8).view(self._count, 2, columns)
        return Planes(pairs, self._buffer(columns // block_columns))

    def _input_of(self, linear: Linear) -> Planes | torch.Tensor:
        return self._inputs[linear.columns, self._plans[id(linear)].block_columns]

    def _partial(self, linear: Linear) -> int:
        """Columns of a row's partial sums, all together."""
        return self._plans[id(linear)].tile.splits * linear.rows

    def _buffer(self, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros((self._count, width), dtype=dtype, device=self._device)


def _start(buffer: torch.Tensor, *shape: int) -> torch.Tensor:
    """The first values of a buffer."""
    return buffer.view(-1)[: math.prod(shape)].view(shape)


BLOCKS_UP_TO = 16
"""Tokens up to which activations have a scale for each block of columns: loading and multiplying such scales costs 6 %
of a step of 32 tokens, and a third of the products' time at 128 (Llama-3.1-8B, one H100)."""


def planes_block(linear: Linear, count: int, *, blocks: bool) -> int:
    """Columns of x that a scale covers for `count` tokens; 0: the linear does not take fixed point.

    Weights with a scale a row need none within their columns, and sum integers to the end where x has none either,
    unless `blocks`: who makes x wants them.
    """
    encodings = [part.encoding for part in linear.parts]
    if any(e.codec != "i8" or e.scales not in ("f16", "f32") for e in encodings):
        return 0
    groups = {e.group_size for e in encodings}
    if any(group % 32 for group in groups):
        return 0
    if count > BLOCKS_UP_TO or (groups == {0} and not blocks):
        return linear.columns
    return 64 if all(group % 64 == 0 for group in groups) else 32


Step = DecodeStep | BatchStep
"""A step of any number of sequences."""


def make_step(
    model: DeviceModel,
    caches: tuple[LayerCache, ...],
    sequences: Sequences,
    last_tokens: torch.Tensor,
    *,
    context_tokens: int,
    compute_dtype: torch.dtype,
    card: Card,
    adapters: Adapters | None = None,
    appends_first: bool = False,
) -> Step:
    """The step of as many rows as there are slots. One row has kernels of its own, unless it has an adapter or rows of
    all numbers have to have the same ones (`appends_first`, as `BatchStep` has it)."""
    given = model, caches, sequences, last_tokens
    if sequences.slots.shape[0] == 1 and adapters is None and not appends_first:
        return DecodeStep(*given, context_tokens=context_tokens, compute_dtype=compute_dtype, card=card)
    return BatchStep(
        *given,
        context_tokens=context_tokens,
        compute_dtype=compute_dtype,
        card=card,
        adapters=adapters,
        appends_first=appends_first,
    )

"""One decode step: the next token of B sequences, from their last tokens to their logits. What a graph captures.

Nothing here reads a length or a token on the host: positions, tokens and page tables are device buffers. A step
of one sequence goes through `gemv`, with activations in fixed point; several go through `rows_linear`.
Kernels, a layer: join_residual, qkv, attention, combine, o, join_residual, gate_up, down.
Shape letters: B sequences, C padded columns, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.models.spec import DenseMLP, ModelSpec
from octavo.runners.cuda.decode_attention import (
    Prefetch,
    Sequences,
    SplitTile,
    decode_attention,
    split_tile_for,
)
from octavo.runners.cuda.device_model import DeviceLayer, DeviceModel, DeviceNorm, Linear
from octavo.runners.cuda.embedding import embed
from octavo.runners.cuda.feed_forward import feed_forward
from octavo.runners.cuda.gemv import Epilogue, Logits, Vector, gemv, grid_of
from octavo.runners.cuda.kv_cache import LayerCache
from octavo.runners.cuda.layout import padded
from octavo.runners.cuda.norm import Planes, join_residual
from octavo.runners.cuda.pick import PIECE_TOKENS, best_of_rows, pick
from octavo.runners.cuda.rows_linear import rows_linear
from octavo.runners.cuda.tiles import tile_for

PREFETCH_BYTES = 16 << 20
"""Of gate and up, while attention runs: a third of the L2 cache of an H100, where it was measured best."""


@dataclass(frozen=True, slots=True)
class Card:
    """What of the device decides how kernels are launched."""

    name: str
    multiprocessors: int
    pdl: bool
    """Programmatic dependent launch: compute capability 9.0 on."""
    l2_bytes: int


class DecodeStep:
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
    ) -> None:
        self._model = model
        self._caches = caches
        self._sequences = sequences
        self._last_tokens = last_tokens
        self._card = card
        spec = model.spec
        count = sequences.slots.shape[0]
        device = last_tokens.device
        self._one = count == 1
        self._slots: tuple[int, ...] = ()

        def buffer(width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros((count, width), dtype=dtype, device=device)

        mixers = [layer.mixer for layer in spec.layers]
        mixed = max(padded(mixer.heads * mixer.head_dim) for mixer in mixers)
        fed = max(padded(layer.ffn.hidden_size) for layer in spec.layers)
        hidden = padded(spec.hidden_size)
        vector = torch.float32 if self._one else compute_dtype
        self._h = buffer(spec.hidden_size)
        self._y = buffer(spec.hidden_size)
        self._planes = Planes(buffer(hidden, torch.int8), buffer(hidden, torch.int8), buffer(hidden // 32))
        self._x = buffer(hidden, vector)
        self._qkv = buffer(max((m.heads + 2 * m.kv_heads) * m.head_dim for m in mixers))
        self._mixed = buffer(mixed, vector)
        self._both = buffer(max(2 * layer.ffn.hidden_size for layer in spec.layers))
        self._fed = buffer(fed, vector)
        self.logits = buffer(spec.vocab_size)
        self.sampled = torch.zeros(count, dtype=torch.int32, device=device)
        tiles = [split_tile_for(mixer, count, context_tokens, card.multiprocessors) for mixer in mixers]
        self._splits: tuple[SplitTile, ...] = tuple(tiles)
        splits = max(tile.splits for tile in tiles)
        heads = max(mixer.heads for mixer in mixers)
        self._parts = buffer(splits * max(m.heads * m.head_dim for m in mixers))
        self._sums = buffer(splits * heads)
        self._pieces = self._count_pieces(spec)
        self._best = buffer(self._pieces)
        self._best_ids = buffer(self._pieces, torch.int32)

    @property
    def nbytes(self) -> int:
        """Of the buffers."""
        tensors = [value for value in vars(self).values() if isinstance(value, torch.Tensor)]
        planes = self._planes
        return sum(t.nbytes for t in (*tensors, planes.high, planes.low, planes.scales))

    def set_slots(self, slots: tuple[int, ...]) -> None:
        """Which slots the rows are; the rest of the batch goes to the spare one."""
        if slots == self._slots:
            return
        filled = [*slots, *[self._sequences.spare_slot] * (len(self.sampled) - len(slots))]
        rows = torch.tensor(filled, dtype=torch.int32)
        # Pinned, since a copy from other memory waits for the stream; torch keeps the block until it is done.
        self._sequences.slots.copy_(rows.pin_memory() if self.sampled.is_cuda else rows, non_blocking=True)
        self._slots = slots

    def forward(self) -> None:
        """Launch the model: logits from each slot's last token; appends its keys and values."""
        model, spec = self._model, self._model.spec
        embed(model.embedding, self._last_tokens, self._sequences.slots, self._h, spec.embedding_multiplier)
        y, post, multiplier = None, None, 1.0
        for index, layer in enumerate(model.layers):
            scale = layer.spec.residual_multiplier
            x = self._join(y, post, layer.pre_mixer, multiplier, layer.qkv)
            self._attend(index, layer, x)
            x = self._join(self._y, layer.post_mixer, layer.pre_ffn, scale, layer.gate_up)
            self._feed(layer, x)
            y, post, multiplier = self._y, layer.post_ffn, scale
        x = self._join(y, post, model.final_norm, multiplier, model.head)
        self._project(x)

    def pick(self, told: torch.Tensor | None = None) -> None:
        """Launch greedy sampling of the logits; moves the slots on. `told`: `octavo.runners.cuda.pick.move_on`."""
        if not self._one:
            best_of_rows(self.logits, self._best, self._best_ids)
        pick(
            self._best,
            self._best_ids,
            self._pieces,
            self._sequences,
            self.sampled,
            self._last_tokens,
            told,
            pdl=self._card.pdl and self._one,
        )

    def _join(
        self,
        y: torch.Tensor | None,
        post: DeviceNorm | None,
        pre: DeviceNorm | None,
        multiplier: float,
        consumer: Linear,
    ) -> Vector | torch.Tensor:
        planes = self._one and not consumer.is_plain
        out: Planes | torch.Tensor = self._planes if planes else self._x
        join_residual(self._h, y, out, post=post, pre=pre, multiplier=multiplier, pdl=self._card.pdl)
        if not self._one:
            return self._x
        if planes:
            return Vector("planes", self._planes.high, self._planes.low, self._planes.scales)
        return Vector("values", self._x)

    def _attend(self, index: int, layer: DeviceLayer, x: Vector | torch.Tensor) -> None:
        mixer = layer.spec.mixer
        qkv = self._view(self._qkv, (mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim)
        mixed = self._view(self._mixed, padded(mixer.heads * mixer.head_dim))
        self._linear(layer.qkv, x, qkv)
        shuffled = self._one and not layer.o.is_plain
        codes = layer.o.parts[0].codes, layer.gate_up.parts[0].codes
        fetch_ahead = self._one and self._card.l2_bytes >= 2 * PREFETCH_BYTES
        decode_attention(
            layer,
            self._caches[index],
            qkv,
            self._sequences,
            self._parts,
            self._sums,
            mixed,
            self._splits[index],
            prefetch=Prefetch(*codes, PREFETCH_BYTES) if fetch_ahead else None,
            shuffled=shuffled,
            pdl=self._card.pdl,
        )
        self._linear(layer.o, self._between(mixed, shuffled), self._y)

    def _feed(self, layer: DeviceLayer, x: Vector | torch.Tensor) -> None:
        ffn = layer.spec.ffn
        assert isinstance(ffn, DenseMLP), "others are declined"
        fed = self._view(self._fed, padded(ffn.hidden_size))
        shuffled = self._one and not layer.down.is_plain
        if self._one and len(layer.gate_up.parts) == 1:
            kind: Epilogue = "gate" if ffn.gated else "activate"
            self._linear(layer.gate_up, x, fed, kind, ffn.activation, shuffled=shuffled)
        else:
            both = self._view(self._both, layer.gate_up.rows)
            self._linear(layer.gate_up, x, both)
            feed_forward(both, fed, ffn, shuffled=shuffled, pdl=self._card.pdl)
        self._linear(layer.down, self._between(fed, shuffled), self._y)

    def _between(self, values: torch.Tensor, shuffled: bool) -> Vector | torch.Tensor:
        """An intermediate vector as the next linear takes it."""
        if not self._one:
            return values
        return Vector("shuffled" if shuffled else "values", values)

    def _project(self, x: Vector | torch.Tensor) -> None:
        spec = self._model.spec
        (head,) = self._model.head.parts
        if isinstance(x, Vector):
            epilogue = Logits(spec.logits_multiplier, spec.final_softcap, self._best, self._best_ids)
            tile = tile_for(self._card.name, head.encoding, head.rows, head.columns)
            gemv(
                head,
                x,
                self.logits,
                tile,
                multiprocessors=self._card.multiprocessors,
                pdl=self._card.pdl,
                epilogue=epilogue,
            )
        else:
            rows_linear(head, x, self.logits)
            finish_logits(self.logits, spec)

    def _linear(
        self,
        linear: Linear,
        x: Vector | torch.Tensor,
        out: torch.Tensor,
        epilogue: Epilogue = "store",
        activation: str = "silu",
        *,
        shuffled: bool = False,
    ) -> None:
        first = 0
        for part in linear.parts:
            if isinstance(x, Vector):
                gemv(
                    part,
                    x,
                    out[0, first:],
                    tile_for(self._card.name, part.encoding, part.rows, part.columns),
                    multiprocessors=self._card.multiprocessors,
                    pdl=self._card.pdl,
                    epilogue=epilogue,
                    activation=activation,
                    shuffled=shuffled,
                )
            else:
                rows_linear(part, x, out[:, first:])
            first += part.rows

    def _view(self, buffer: torch.Tensor, width: int) -> torch.Tensor:
        """[B, width], dense, of a buffer that is as wide as the widest layer."""
        return buffer.view(-1)[: buffer.shape[0] * width].view(-1, width)

    def _count_pieces(self, spec: ModelSpec) -> int:
        """Pieces of a row of logits of which `pick` takes the best."""
        if not self._one:
            return -(-spec.vocab_size // PIECE_TOKENS)
        (head,) = self._model.head.parts
        tile = tile_for(self._card.name, head.encoding, head.rows, head.columns)
        unused = Logits(1.0, None, self.logits, self.logits)
        return grid_of(head, tile, unused, self._card.multiprocessors)[0]


def finish_logits(logits: torch.Tensor, spec: ModelSpec) -> None:
    """The model's multiplier and softcap on rows [T, V], in place."""
    if spec.logits_multiplier != 1:
        logits.mul_(spec.logits_multiplier)
    if spec.final_softcap is not None:
        logits.div_(spec.final_softcap).tanh_().mul_(spec.final_softcap)

"""One decode step: the next token of B sequences, from their last tokens to their logits. What a graph captures.

Nothing here reads a length or a token on the host: positions, tokens and page tables are device buffers. A step
of one sequence goes through `gemv`, with activations in fixed point; several go through `rows_linear`.
Kernels, a layer: join_residual, qkv, attention, combine, o, join_residual, gate_up, down. Where a step of one
sequence needs no more than rms norms before its blocks, o and down add to the residual stream themselves, and qkv and
gate_up take it through their norm (`is_chain`): six.
Shape letters: B sequences, C padded columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from octavo.models.spec import DenseMLP, ModelSpec
from octavo.runners.cuda.decode_attention import (
    Prefetch,
    Sequences,
    SplitTile,
    decode_attention,
    split_tile_for,
)
from octavo.runners.cuda.device_model import DeviceLayer, DeviceModel, DeviceNorm, Linear, Matrix
from octavo.runners.cuda.embedding import embed
from octavo.runners.cuda.feed_forward import feed_forward
from octavo.runners.cuda.fixed_point import Planes
from octavo.runners.cuda.gemv import Add, Epilogue, Logits, Vector, ahead_of, gemv, grid_of, shuffle
from octavo.runners.cuda.kv_cache import LayerCache
from octavo.runners.cuda.layout import padded
from octavo.runners.cuda.low_rank import Adapters
from octavo.runners.cuda.norm import join_residual
from octavo.runners.cuda.pick import PIECE_TOKENS, best_of_rows, pick
from octavo.runners.cuda.rows_linear import rows_linear
from octavo.runners.cuda.tiles import Key, Tile, tile_for
from octavo.runners.cuda.user_tiles import user_tiles

FETCH_AHEAD = True
SPREAD = True
PREFETCH_BYTES = 16 << 20
"""Of gate and up, while attention runs: a third of the L2 cache of an H100, where it was measured best."""


@dataclass(frozen=True, slots=True)
class Card:
    """What of the device decides how kernels are launched."""

    name: str
    multiprocessors: int
    pdl: bool
    """Programmatic dependent launch, and tensor descriptors: compute capability 9.0 on."""
    l2_bytes: int
    tiles: Mapping[Key, Tile] = field(default_factory=dict)
    """The user's: `octavo bench --tune`."""


def card_of(device: torch.device) -> Card:
    """Raises CacheError for a damaged table of the user's tiles."""
    if device.type != "cuda":  # the interpreter
        return Card("none", 4, False, 0)
    found = torch.cuda.get_device_properties(device)
    count, pdl = found.multi_processor_count, found.major >= 9
    return Card(found.name, count, pdl, found.L2_cache_size, user_tiles(found.name))


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
        adapters: Adapters | None = None,
    ) -> None:
        """`adapters`: rows may have one; a single row is then computed as a batch is."""
        self._model = model
        self._caches = caches
        self._sequences = sequences
        self._last_tokens = last_tokens
        self._card = card
        spec = model.spec
        count = sequences.slots.shape[0]
        device = last_tokens.device
        self._adapters = adapters
        self._one = count == 1 and adapters is None
        self._slots: tuple[int, ...] = ()

        def buffer(width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros((count, width), dtype=dtype, device=device)

        mixers = [layer.mixer for layer in spec.layers]
        mixed = max(padded(mixer.heads * mixer.head_dim) for mixer in mixers)
        fed = max(padded(layer.ffn.hidden_size) for layer in spec.layers)
        hidden = padded(spec.hidden_size)
        vector = torch.float32 if self._one else compute_dtype
        self._chain = self._one and is_chain(model)
        self._h = buffer(hidden if self._chain else spec.hidden_size)
        self._y = buffer(spec.hidden_size)
        self._planes = Planes(buffer(2 * hidden, torch.int8).view(count, 2, hidden), buffer(hidden // 32))
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
        self._normed = self._chain_inputs() if self._chain else {}
        self._best = buffer(self._pieces)
        self._best_ids = buffer(self._pieces, torch.int32)

    @property
    def nbytes(self) -> int:
        """Of the buffers."""
        tensors = [value for value in vars(self).values() if isinstance(value, torch.Tensor)]
        return sum(t.nbytes for t in tensors) + self._planes.nbytes

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
        embed(
            model.embedding,
            self._last_tokens,
            self._sequences.slots,
            self._h,
            spec.embedding_multiplier,
            width=spec.hidden_size,
            shuffled=self._chain,
        )
        y, post, multiplier = None, None, 1.0
        for index, layer in enumerate(model.layers):
            scale = layer.spec.residual_multiplier
            x = self._join(y, post, layer.pre_mixer, multiplier, layer.qkv)
            self._attend(index, layer, x)
            x = self._join(self._y, layer.post_mixer, layer.pre_ffn, scale, layer.gate_up)
            following = model.layers[index + 1].qkv if index + 1 < len(model.layers) else model.head
            self._feed(layer, x, following)
            y, post, multiplier = self._y, layer.post_ffn, scale
        x = self._join(y, post, model.final_norm, multiplier, model.head)
        self._project(x)

    def pick(self) -> None:
        """Launch greedy sampling of the logits; moves the slots on."""
        if not self._one:
            best_of_rows(self.logits, self._best, self._best_ids)
        pick(
            self._best,
            self._best_ids,
            self._pieces,
            self._sequences,
            self.sampled,
            self._last_tokens,
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
        if self._chain:
            assert pre is not None
            return self._normed[id(pre)]
        planes = self._one and not consumer.takes_values
        out: Planes | torch.Tensor = self._planes if planes else self._x
        join_residual(self._h, y, out, post=post, pre=pre, multiplier=multiplier, pdl=self._card.pdl)
        if not self._one:
            return self._x
        if planes:
            return Vector("planes", self._planes.pairs[0, 0], self._planes.pairs[0, 1], self._planes.scales)
        return Vector("values", self._x)

    def _attend(self, index: int, layer: DeviceLayer, x: Vector | torch.Tensor) -> None:
        mixer = layer.spec.mixer
        qkv = self._view(self._qkv, (mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim)
        mixed = self._view(self._mixed, padded(mixer.heads * mixer.head_dim))
        self._linear(layer.qkv, x, qkv)
        shuffled = self._one and not layer.o.takes_values
        codes = layer.o.parts[0].codes, layer.gate_up.parts[0].codes
        fetch_ahead = self._one and self._card.l2_bytes >= 2 * PREFETCH_BYTES
        part = layer.gate_up.parts[0]
        kind = self._kind_of(layer.gate_up)
        ctas = grid_of(part, self._tile(part), kind, self._card.multiprocessors)[0]
        segments = ctas * (2 if kind == "gate" else 1) if SPREAD else 1
        decode_attention(
            layer,
            self._caches[index],
            qkv,
            self._sequences,
            self._parts,
            self._sums,
            mixed,
            self._splits[index],
            prefetch=Prefetch(*codes, PREFETCH_BYTES, segments) if fetch_ahead else None,
            shuffled=shuffled,
            pdl=self._card.pdl,
        )
        self._add(layer, layer.o, self._between(mixed, shuffled), None if SPREAD else layer.gate_up)

    def _feed(self, layer: DeviceLayer, x: Vector | torch.Tensor, following: Linear) -> None:
        ffn = layer.spec.ffn
        assert isinstance(ffn, DenseMLP), "others are declined"
        fed = self._view(self._fed, padded(ffn.hidden_size))
        shuffled = self._one and not layer.down.takes_values
        if self._one and len(layer.gate_up.parts) == 1:
            kind: Epilogue = "gate" if ffn.gated else "activate"
            self._linear(layer.gate_up, x, fed, kind, ffn.activation, shuffled=shuffled, following=layer.down)
        else:
            both = self._view(self._both, layer.gate_up.rows)
            self._linear(layer.gate_up, x, both)
            feed_forward(both, fed, ffn, shuffled=shuffled, pdl=self._card.pdl)
        self._add(layer, layer.down, self._between(fed, shuffled), following)

    def _add(
        self, layer: DeviceLayer, linear: Linear, x: Vector | torch.Tensor, following: Linear | None
    ) -> None:
        """The end of a block: to the residual stream, or to `y` for the next `_join`."""
        if self._chain:
            self._linear(
                linear,
                x,
                self._h,
                Add(layer.spec.residual_multiplier),
                shuffled=True,
                following=following,
            )
        else:
            self._linear(linear, x, self._y, following=following)

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
            tile = self._tile(head)
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
            if self._adapters is not None:
                self._adapters.add_rows(self._model.head, x, self.logits, self._sequences.slots)
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
        following: Linear | None = None,
    ) -> None:
        ahead = None
        if following is not None and self._one and FETCH_AHEAD:
            part = following.parts[0]
            ahead = ahead_of(part, self._tile(part), self._kind_of(following), self._card.multiprocessors)
        first = 0
        for part in linear.parts:
            if isinstance(x, Vector):
                gemv(
                    part,
                    x,
                    out[0, first:],
                    self._tile(part),
                    multiprocessors=self._card.multiprocessors,
                    pdl=self._card.pdl,
                    epilogue=epilogue,
                    activation=activation,
                    shuffled=shuffled,
                    ahead=ahead,
                )
            else:
                rows_linear(part, x, out[:, first:])
            first += part.rows
        if self._adapters is not None and isinstance(x, torch.Tensor):
            self._adapters.add_rows(linear, x, out, self._sequences.slots)

    def _chain_inputs(self) -> dict[int, Vector]:
        """By the id of each norm before a block: what its linear takes."""
        model, width = self._model, self._model.spec.hidden_size
        norms = [norm for layer in model.layers for norm in (layer.pre_mixer, layer.pre_ffn)]
        inputs = {}
        for norm in (*norms, model.final_norm):
            assert norm is not None
            gain = torch.nn.functional.pad(norm.gain, (0, padded(width) - width))
            inputs[id(norm)] = Vector("normed", self._h, scales=shuffle(gain), norm_width=width, eps=norm.eps)
        return inputs

    def _kind_of(self, linear: Linear) -> Epilogue:
        """Of the gemv of a linear, as far as it matters for its grid."""
        for layer in self._model.layers:
            ffn = layer.spec.ffn
            if linear is layer.gate_up and isinstance(ffn, DenseMLP) and ffn.gated:
                return "gate" if len(linear.parts) == 1 else "store"
        return "store"

    def _tile(self, matrix: Matrix) -> Tile:
        return tile_for(self._card.name, matrix.encoding, matrix.rows, matrix.columns, self._card.tiles)

    def _view(self, buffer: torch.Tensor, width: int) -> torch.Tensor:
        """[B, width], dense, of a buffer that is as wide as the widest layer."""
        return buffer.view(-1)[: buffer.shape[0] * width].view(-1, width)

    def _count_pieces(self, spec: ModelSpec) -> int:
        """Pieces of a row of logits of which `pick` takes the best."""
        if not self._one:
            return -(-spec.vocab_size // PIECE_TOKENS)
        (head,) = self._model.head.parts
        tile = self._tile(head)
        unused = Logits(1.0, None, self.logits, self.logits)
        return grid_of(head, tile, unused, self._card.multiprocessors)[0]


def is_chain(model: DeviceModel) -> bool:
    """Whether blocks are rms norm, linears of fixed point, and a sum: the least kernels a layer."""

    def rms(norm: DeviceNorm | None) -> bool:
        return norm is not None and norm.kind == "rms" and norm.bias is None

    return rms(model.final_norm) and all(
        rms(layer.pre_mixer)
        and rms(layer.pre_ffn)
        and layer.post_mixer is None
        and layer.post_ffn is None
        and not any(part.takes_values for part in (layer.qkv, layer.o, layer.gate_up, layer.down, model.head))
        for layer in model.layers
    )


def finish_logits(logits: torch.Tensor, spec: ModelSpec) -> None:
    """The model's multiplier and softcap on rows [T, V], in place."""
    if spec.logits_multiplier != 1:
        logits.mul_(spec.logits_multiplier)
    if spec.final_softcap is not None:
        logits.div_(spec.final_softcap).tanh_().mul_(spec.final_softcap)

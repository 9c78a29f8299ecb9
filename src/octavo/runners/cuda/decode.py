"""One decode step of one sequence: its next token's logits from its last token. What a graph captures.

Nothing here reads a length or a token on the host: positions, tokens and page tables are device buffers. Linears
are `gemv`s with activations in fixed point (several sequences: `batch_decode`).
Kernels, a layer: join_residual, qkv, attention, combine, o, join_residual, gate_up, down. Where a model needs no more
than rms norms before its blocks, o and down add to the residual stream themselves, and qkv and gate_up take it
through their norm (`is_chain`): six.
Shape letters: C padded columns, V vocabulary.
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
    fill_blocks,
    split_tile_for,
)
from octavo.runners.cuda.device_model import DeviceLayer, DeviceModel, DeviceNorm, Linear, Matrix
from octavo.runners.cuda.embedding import embed
from octavo.runners.cuda.feed_forward import feed_forward
from octavo.runners.cuda.fixed_point import Planes
from octavo.runners.cuda.gemv import (
    BLOCK_COLUMNS,
    Add,
    Epilogue,
    Logits,
    Vector,
    gemv,
    grid_of,
    leaves_planes,
    shuffle,
)
from octavo.runners.cuda.kv_cache import LayerCache
from octavo.runners.cuda.layout import padded
from octavo.runners.cuda.norm import join_residual
from octavo.runners.cuda.pick import pick
from octavo.runners.cuda.tiles import Key, Tile, tile_for
from octavo.runners.cuda.user_tiles import user_tiles

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
    """Buffers and launches of one sequence. `logits` fp32 [1, V] and `sampled` int32 [1] are its results."""

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
        """`compute_dtype` is that of batches: one sequence's activations are fixed point and fp32."""
        self._model = model
        self._caches = caches
        self._sequences = sequences
        self._last_tokens = last_tokens
        self._card = card
        spec = model.spec
        device = last_tokens.device
        self._slots: tuple[int, ...] = ()

        def buffer(width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros((1, width), dtype=dtype, device=device)

        mixers = [layer.mixer for layer in spec.layers]
        hidden = padded(spec.hidden_size)
        self._chain = is_chain(model)
        self._h = buffer(hidden if self._chain else spec.hidden_size)
        self._y = buffer(spec.hidden_size)

        def planes(width: int) -> Planes:
            columns = padded(width)
            pairs = buffer(2 * columns, torch.int8).view(1, 2, columns)
            return Planes(pairs, buffer(columns // BLOCK_COLUMNS))

        self._planes = planes(spec.hidden_size)
        self._x = buffer(hidden)
        self._normed = self._chain_inputs() if self._chain else {}
        self._qkv = buffer(max((m.heads + 2 * m.kv_heads) * m.head_dim for m in mixers))
        self._mixed = buffer(max(padded(mixer.heads * mixer.head_dim) for mixer in mixers))
        # By their width, so that nothing writes to another's padding.
        self._mixed_planes = {width: planes(width) for width in {m.heads * m.head_dim for m in mixers}}
        self._both = buffer(max(2 * layer.ffn.hidden_size for layer in spec.layers))
        self._fed = buffer(max(padded(layer.ffn.hidden_size) for layer in spec.layers))
        self._fed_planes = {width: planes(width) for width in {x.ffn.hidden_size for x in spec.layers}}
        self.logits = buffer(spec.vocab_size)
        self.sampled = torch.zeros(1, dtype=torch.int32, device=device)
        tiles = [split_tile_for(mixer, 1, context_tokens, card.multiprocessors) for mixer in mixers]
        self._splits: tuple[SplitTile, ...] = tuple(tiles)
        splits = max(tile.splits for tile in tiles)
        heads = max(mixer.heads for mixer in mixers)
        self._parts = buffer(splits * max(m.heads * m.head_dim for m in mixers))
        self._sums = buffer(splits * heads)
        self._pieces = self._count_pieces()
        self._best = buffer(self._pieces)
        self._best_ids = buffer(self._pieces, torch.int32)

    @property
    def nbytes(self) -> int:
        """Of the buffers."""
        tensors = [value for value in vars(self).values() if isinstance(value, torch.Tensor)]
        gains = [x.scales for x in self._normed.values() if x.scales is not None]
        planes = (self._planes, *self._mixed_planes.values(), *self._fed_planes.values())
        return sum(t.nbytes for t in (*tensors, *gains)) + sum(x.nbytes for x in planes)

    def set_slots(self, slots: tuple[int, ...]) -> None:
        """Which slot it is."""
        if slots == self._slots:
            return
        rows = torch.tensor(slots, dtype=torch.int32)
        # Pinned, since a copy from other memory waits for the stream; torch keeps the block until it is done.
        self._sequences.slots.copy_(rows.pin_memory() if self.sampled.is_cuda else rows, non_blocking=True)
        self._slots = slots

    def forward(self) -> None:
        """Launch the model: logits from the slot's last token; appends its keys and values."""
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
            self._feed(layer, x)
            y, post, multiplier = self._y, layer.post_ffn, scale
        x = self._join(y, post, model.final_norm, multiplier, model.head)
        self._project(x)

    def pick(self, told: torch.Tensor | None = None) -> None:
        """Launch greedy sampling of the logits; moves the slot on. `told`: `octavo.runners.cuda.pick.move_on`."""
        pick(
            self._best,
            self._best_ids,
            self._pieces,
            self._sequences,
            self.sampled,
            self._last_tokens,
            told,
            pdl=self._card.pdl,
        )

    def _join(
        self,
        y: torch.Tensor | None,
        post: DeviceNorm | None,
        pre: DeviceNorm | None,
        multiplier: float,
        consumer: Linear,
    ) -> Vector:
        """What `consumer` takes, once `y` is in the residual stream."""
        if self._chain:
            assert pre is not None
            return self._normed[id(pre)]
        out = self._x if consumer.takes_values else self._planes
        join_residual(self._h, y, out, post=post, pre=pre, multiplier=multiplier, pdl=self._card.pdl)
        if consumer.takes_values:
            return Vector("values", self._x)
        return _vector(self._planes)

    def _attend(self, index: int, layer: DeviceLayer, x: Vector) -> None:
        mixer = layer.spec.mixer
        qkv = self._qkv[:, : (mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim]
        width = mixer.heads * mixer.head_dim
        mixed = self._mixed[:, : padded(width)]
        self._linear(layer.qkv, x, qkv)
        shuffled = not layer.o.takes_values
        planes = self._mixed_planes[width] if shuffled and fill_blocks(mixer) else None
        codes = layer.o.parts[0].codes, layer.gate_up.parts[0].codes
        fetch_ahead = self._card.l2_bytes >= 2 * PREFETCH_BYTES
        decode_attention(
            layer,
            self._caches[index],
            qkv,
            self._sequences,
            self._parts,
            self._sums,
            mixed if planes is None else planes,
            self._splits[index],
            prefetch=Prefetch(*codes, PREFETCH_BYTES) if fetch_ahead else None,
            shuffled=shuffled,
            pdl=self._card.pdl,
        )
        made = Vector("shuffled" if shuffled else "values", mixed) if planes is None else _vector(planes)
        self._add(layer, layer.o, made)

    def _feed(self, layer: DeviceLayer, x: Vector) -> None:
        ffn = layer.spec.ffn
        assert isinstance(ffn, DenseMLP), "others are declined"
        fed = self._fed[:, : padded(ffn.hidden_size)]
        shuffled = not layer.down.takes_values
        made = Vector("shuffled" if shuffled else "values", fed)
        if len(layer.gate_up.parts) == 1:
            kind: Epilogue = "gate" if ffn.gated else "activate"
            if shuffled and leaves_planes(ffn.hidden_size, self._card.multiprocessors):
                planes = self._fed_planes[ffn.hidden_size]
                self._linear(layer.gate_up, x, planes, kind, ffn.activation)
                made = _vector(planes)
            else:
                self._linear(layer.gate_up, x, fed, kind, ffn.activation, shuffled=shuffled)
        else:
            both = self._both[:, : layer.gate_up.rows]
            self._linear(layer.gate_up, x, both)
            feed_forward(both, fed, ffn, shuffled=shuffled, pdl=self._card.pdl)
        self._add(layer, layer.down, made)

    def _add(self, layer: DeviceLayer, linear: Linear, x: Vector) -> None:
        """The end of a block: to the residual stream, or to `y` for the next `_join`."""
        if self._chain:
            self._linear(linear, x, self._h, Add(layer.spec.residual_multiplier), shuffled=True)
        else:
            self._linear(linear, x, self._y)

    def _project(self, x: Vector) -> None:
        spec = self._model.spec
        best = Logits(spec.logits_multiplier, spec.final_softcap, self._best, self._best_ids)
        self._linear(self._model.head, x, self.logits, best)

    def _linear(
        self,
        linear: Linear,
        x: Vector,
        out: torch.Tensor | Planes,
        epilogue: Epilogue = "store",
        activation: str = "silu",
        *,
        shuffled: bool = False,
    ) -> None:
        first = 0
        for part in linear.parts:
            gemv(
                part,
                x,
                out if isinstance(out, Planes) else out[0, first:],
                self._tile(part),
                multiprocessors=self._card.multiprocessors,
                pdl=self._card.pdl,
                epilogue=epilogue,
                activation=activation,
                shuffled=shuffled,
            )
            first += part.rows

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

    def _tile(self, matrix: Matrix) -> Tile:
        return tile_for(self._card.name, matrix.encoding, matrix.rows, matrix.columns, self._card.tiles)

    def _count_pieces(self) -> int:
        """Pieces of the logits of which `pick` takes the best."""
        (head,) = self._model.head.parts
        return grid_of(head, self._tile(head), "store", self._card.multiprocessors)[0]


def _vector(planes: Planes) -> Vector:
    high, low = planes.pairs[0]
    return Vector("planes", high, low, planes.scales)


CHAIN_FROM = 4096
"""Hidden columns from which two kernels less a layer are worth that each CTA of qkv and gate_up makes its own input:
Llama-3.1-8B gains 3 %, Llama-3.2-1B (2048) loses 1 % with the best tiles of both (one H100)."""


def is_chain(model: DeviceModel) -> bool:
    """Whether blocks are rms norm, linears of fixed point, and a sum, and wide enough: the least kernels a layer."""

    def rms(norm: DeviceNorm | None) -> bool:
        return norm is not None and norm.kind == "rms" and norm.bias is None

    return (
        model.spec.hidden_size >= CHAIN_FROM
        and rms(model.final_norm)
        and all(
            rms(layer.pre_mixer)
            and rms(layer.pre_ffn)
            and layer.post_mixer is None
            and layer.post_ffn is None
            and not any(
                part.takes_values for part in (layer.qkv, layer.o, layer.gate_up, layer.down, model.head)
            )
            for layer in model.layers
        )
    )


def finish_logits(logits: torch.Tensor, spec: ModelSpec) -> None:
    """The model's multiplier and softcap on rows [T, V], in place."""
    if spec.logits_multiplier != 1:
        logits.mul_(spec.logits_multiplier)
    if spec.final_softcap is not None:
        logits.div_(spec.final_softcap).tanh_().mul_(spec.final_softcap)

"""One causal fp32 forward over the same quantized weights: what a decode step's logits are held to."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from octavo.runners.cuda.dequantize import dequantize
from octavo.runners.cuda.device_model import DeviceModel, DeviceNorm, Linear, Matrix
from octavo.runners.cuda.heads import reference as rotate


def values_of(matrix: Matrix) -> torch.Tensor:
    """fp32 [N, C]."""
    if matrix.encoding.codec == "f32":
        return matrix.codes.view(matrix.rows, matrix.columns)
    out = torch.empty((matrix.rows, matrix.columns), device=matrix.codes.device)
    dequantize(matrix, 0, matrix.rows, out)
    return out


@torch.inference_mode()
def logits_of(
    model: DeviceModel,
    token_ids: torch.Tensor,
    last: int,
    rounded: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> torch.Tensor:
    """fp32 [last, V] of the last rows of a sequence int64 [T]. `rounded`: what is done to the input of every linear."""
    assert not torch.backends.cuda.matmul.allow_tf32
    spec = model.spec

    def times(x: torch.Tensor, linear: Linear) -> torch.Tensor:
        x = rounded(F.pad(x, (0, linear.columns - x.shape[-1])))
        parts = [x @ values_of(part).T for part in linear.parts]
        return torch.cat(
            [y if part.bias is None else y + part.bias for y, part in zip(parts, linear.parts, strict=True)],
            -1,
        )

    def normed(x: torch.Tensor, norm: DeviceNorm | None) -> torch.Tensor:
        return x if norm is None else F.rms_norm(x, x.shape[-1:], norm.gain, norm.eps)

    tokens = token_ids.shape[0]
    at = torch.arange(tokens, device=token_ids.device)
    h = values_of(model.embedding)[token_ids, : spec.hidden_size] * spec.embedding_multiplier
    for layer in model.layers:
        mixer = layer.spec.mixer
        sizes = [mixer.heads * mixer.head_dim] + 2 * [mixer.kv_heads * mixer.head_dim]
        q, k, v = times(normed(h, layer.pre_mixer), layer.qkv).split(sizes, -1)
        q, k, v = (t.view(tokens, -1, mixer.head_dim) for t in (q, k, v))
        assert layer.cosines is not None
        assert layer.sines is not None
        q, k = normed(q, layer.q_norm), normed(k, layer.k_norm)
        angles = layer.cosines[:tokens], layer.sines[:tokens]
        q, k = rotate(q, *angles), rotate(k, *angles)
        k, v = (t.repeat_interleave(mixer.heads // mixer.kv_heads, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * mixer.scale
        if mixer.softcap is not None:
            scores = mixer.softcap * torch.tanh(scores / mixer.softcap)
        hidden = at[None, :] > at[:, None]
        if mixer.window is not None:
            hidden = hidden | (at[None, :] <= at[:, None] - mixer.window)
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        h = h + normed(times(mixed.flatten(1), layer.o), layer.post_mixer)
        gate, up = times(normed(h, layer.pre_ffn), layer.gate_up).chunk(2, -1)
        gate = F.gelu(gate, approximate="tanh") if layer.spec.ffn.activation == "gelu_tanh" else F.silu(gate)
        h = h + normed(times(gate * up, layer.down), layer.post_ffn)
    rows = times(normed(h[-last:], model.final_norm), model.head) * spec.logits_multiplier
    return rows if spec.final_softcap is None else spec.final_softcap * torch.tanh(rows / spec.final_softcap)

"""llm-int8 is bitsandbytes' own format: codes, scales and weights equal bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.errors import ModelFormatError
from octavo.quant.affine import LLM_INT8

bitsandbytes = pytest.importorskip("bitsandbytes")


def linear8bit(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """CB and SCB as Linear8bitLt stores them for these weights."""
    layer = bitsandbytes.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    return layer.weight.CB.numpy(), layer.weight.SCB.numpy()


def cases() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(64, 333, generator=generator)
    halves = torch.arange(-254, 255, dtype=torch.float32)[None] / 254
    rows_of_zeros = normal.clone()
    rows_of_zeros[::3] = 0
    return {
        "normal": normal * 0.02,
        "outliers": normal * torch.exp(3 * torch.randn(64, 333, generator=generator)).clamp(max=1e3),
        "ties": halves.repeat(3, 1) * torch.tensor([[1.0], [127.0], [0.37]]),
        "zero rows": rows_of_zeros,
        "tiny": normal * 1e-7,
        "underflow": normal * 1e-9,
        "one": normal[:1, :1],
        "column": normal[:, :1],
        "largest float16": normal.clamp(-1, 1) * 65504,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", cases())
def test_codes_scales_and_weights_are_bitsandbytes(name, dtype):
    weight = cases()[name].to(dtype)
    if not weight.to(torch.float16).isfinite().all():  # bfloat16 rounds 65504 up
        with pytest.raises(ModelFormatError):
            LLM_INT8.pack(weight.float().numpy())
        return
    codes, scales = linear8bit(weight)
    packed = LLM_INT8.pack(weight.float().numpy())
    np.testing.assert_array_equal(packed["codes"], codes)
    assert packed["scales"].dtype == scales.dtype == np.float32
    np.testing.assert_array_equal(packed["scales"][:, 0].view(np.uint32), scales.view(np.uint32))
    expected = bitsandbytes.functional.int8_vectorwise_dequant(
        torch.from_numpy(codes), torch.from_numpy(scales)
    ).numpy()
    ours = LLM_INT8.unpack(packed, weight.shape[1])
    np.testing.assert_array_equal(ours.view(np.uint32), expected.view(np.uint32))


def test_the_float16_cast_matters():
    """The control: quantizing the float32 weights directly gives other codes."""
    weight = torch.randn(64, 333, generator=torch.Generator().manual_seed(7)) * 0.02
    codes, scales = linear8bit(weight)
    direct, direct_scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.clone())
    assert (direct.numpy() != codes).any() or (direct_scales.numpy() != scales).any()


def test_beyond_float16_is_refused():
    with pytest.raises(ModelFormatError, match="in float16, to which"):
        LLM_INT8.pack(np.full((1, 2), 65520, np.float32))

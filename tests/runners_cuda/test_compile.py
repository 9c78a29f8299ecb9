"""Every kernel compiles for every capability, within its shared memory. Needs no card."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
"""Most a block may have: the CUDA C++ programming guide's table of compute capabilities."""

KERNELS = {
    "embedding_kernel",
    "norm_kernel",
    "gemv_kernel",
    "decode_attention_kernel",
    "combine_kernel",
    "pick_kernel",
    "shape_kernel",
    "draw_kernel",
    "settle_kernel",
    "look_kernel",
    "rank_kernel",
    "best_of_rows_kernel",
    "rows_linear_kernel",
    "planes_linear_kernel",
    "batch_attention_kernel",
    "join_splits_kernel",
    "feed_forward_kernel",
    "quantize_rows_kernel",
    "dequantize_kernel",
    "rotate_kernel",
    "prefill_attention_kernel",
    "append_rows_kernel",
    "int8_linear_kernel",
    "one_scale_kernel",
    "round_kernel",
    "shrink_kernel",
    "expand_kernel",
}


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_compile_and_fit(capability: int) -> None:
    script = Path(__file__).with_name("compile_kernels.py")
    codecs = "i8,int4,nf4,bf16" if capability == 80 else "i8"  # half a minute saved: they share their tiles
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script, str(capability), codecs],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in found} == KERNELS
    too_large = {name: int(shared) for name, shared in found if int(shared) > SHARED_BYTES[capability]}
    assert not too_large

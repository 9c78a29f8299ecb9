"""What computes each part of a model here, in words for `explain` and `info()`."""

from __future__ import annotations

import platform
from collections.abc import Mapping

from octavo.quant.format import Format
from octavo.runners.cpu.layout import encoding_of
from octavo.runners.cpu.library import IsaName
from octavo.settings import ActivationsName
from octavo.weights import StoredBundle


def kernel_names(
    weights: Mapping[str, StoredBundle], isa: IsaName, activations: ActivationsName
) -> dict[str, str]:
    """Part -> instruction set and arithmetic: "int8 linears" -> "AVX2, int16 activations", ..."""
    formats = {
        chosen.name: chosen
        for bundle in weights.values()
        for parameter, chosen in zip(bundle.parameters, bundle.formats, strict=True)
        if parameter.role != "vector"
    }
    vectors = _vectors(isa)
    names = {
        f"{name} linears": f"{vectors}, {_activations(chosen, activations)} activations"
        for name, chosen in sorted(formats.items())
    }
    return names | {"attention": f"{vectors}, fp16 keys and values, fp32 sums"}


def _activations(chosen: Format, asked: ActivationsName) -> str:
    encoding = encoding_of(chosen, 64, 8)
    assert encoding is not None
    if encoding.takes_fp32:
        return "fp32"
    return asked if encoding.takes_int8 else "int16"


def _vectors(isa: IsaName) -> str:
    if isa == "portable":
        return "SSE2" if platform.machine().lower() in ("x86_64", "amd64") else "portable vectors"
    return {"avx2": "AVX2", "avx512": "AVX-512 VNNI"}[isa]

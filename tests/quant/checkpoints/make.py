"""Writes the small checkpoints of this folder with the libraries that defined them, and what they dequantize to.

    python make.py AUTO_GPTQ AUTO_AWQ

AUTO_GPTQ: a folder with auto_gptq 0.7.1 (the wheel, unpacked), AUTO_AWQ: one with autoawq 0.2.9 (the sdist,
unpacked); compressed-tensors 0.20.0 installed. Only their torch code is used: it runs on any CPU. Each file
holds the tensors of some modules, and for module m `expected.m`, its weights as the library computes them from
float32 scales, and `expected16.m`, from the 16-bit scales that stand in the file.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
ROWS, COLUMNS = 64, 96
GENERATOR = torch.Generator().manual_seed(20)


def weights(rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(rows, columns, generator=GENERATOR) * 0.05


def module_at(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def write(name: str, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    metadata = {"quantization_config": json.dumps(config)}
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, HERE / f"{name}.safetensors", metadata
    )


def grid(
    weight: torch.Tensor, groups: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros [N, groups] from each group's least and largest weight."""
    count, top = int(groups.max()) + 1, 2**bits - 1
    scales, zeros = torch.empty(len(weight), count), torch.empty(len(weight), count)
    for group in range(count):
        part = weight[:, groups == group]
        least, largest = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            largest = torch.maximum(largest, -least)
            least = -largest
        scales[:, group] = (largest - least) / top
        zeros[:, group] = (top + 1) / 2 if symmetric else torch.round(-least / scales[:, group])
    return scales.half().float(), zeros


def gptq(folder: Path) -> None:
    sys.modules.setdefault("auto_gptq", types.ModuleType("auto_gptq"))
    linear = module_at(folder / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py", "qlinear_cuda").QuantLinear
    shuffled = torch.randperm(COLUMNS, generator=GENERATOR)
    for name, bits, group_size, symmetric, act_order in (
        ("gptq-4", 4, 32, False, False),
        ("gptq-4-sym", 4, -1, True, False),
        ("gptq-4-act", 4, 32, False, True),
        ("gptq-8", 8, 32, False, False),
    ):
        weight = weights()
        groups = torch.arange(COLUMNS) // (COLUMNS if group_size == -1 else group_size)
        groups = groups[shuffled] if act_order else groups
        scales, zeros = grid(weight, groups, bits, symmetric)
        module = linear(bits, group_size, COLUMNS, ROWS, bias=True, weight_dtype=torch.float32)
        source = torch.nn.Linear(COLUMNS, ROWS)
        source.weight.data = weight
        module.pack(source, scales.clone(), zeros.clone(), groups.int())
        module.bias.zero_()
        expected = module(torch.eye(COLUMNS)).T
        module.scales, module.bias = module.scales.half(), module.bias.half()
        expected16 = module(torch.eye(COLUMNS).half()).T
        parts = {f"q.{key}": value for key, value in module.state_dict().items()}
        config = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "sym": symmetric,
            "desc_act": act_order,
            "damp_percent": 0.1,
            "true_sequential": True,
            "static_groups": False,
        }
        write(name, config, parts | {"expected.q": expected, "expected16.q": expected16})


def awq(folder: Path) -> None:
    packing = module_at(folder / "awq/utils/packing_utils.py", "awq.utils.packing_utils")
    for name, attributes in (
        ("awq", {}),
        ("awq.utils", {}),
        ("awq.utils.module", {"try_import": lambda _: (None, "not needed")}),
        ("awq.utils.utils", {"get_best_device": lambda: "cpu"}),
        ("awq.modules", {}),
        ("awq.modules.triton", {}),
        ("awq.modules.triton.gemm", {"awq_gemm_triton": None, "awq_dequantize_triton": None}),
        ("awq.utils.packing_utils", vars(packing)),
    ):
        stub = types.ModuleType(name)
        vars(stub).update(attributes)
        sys.modules[name] = stub
    gemm = module_at(folder / "awq/modules/linear/gemm.py", "awq.modules.linear.gemm").WQLinear_GEMM
    weight = weights()
    scales, zeros = grid(weight, torch.arange(COLUMNS) // 32, 4, False)
    source = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    source.weight.data = weight
    module = gemm.from_linear(source, 4, 32, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())

    def dequantized(by: torch.Tensor) -> torch.Tensor:
        return packing.dequantize_gemm(module.qweight, module.qzeros, by, 4, 32).T

    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    expected = {"expected.q": dequantized(module.scales.float()), "expected16.q": dequantized(module.scales)}
    write("awq-4", config, {f"q.{key}": value for key, value in module.state_dict().items()} | expected)


def compressed() -> None:
    from compressed_tensors.compressors.naive_quantized.base import (
        FloatQuantizationCompressor,
        IntQuantizationCompressor,
    )
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    def tensors(
        compressor: Any, args: QuantizationArgs, scale_dtype: torch.dtype, columns: int
    ) -> dict[str, Any]:
        weight = weights(ROWS, columns)
        match args.strategy:
            case "tensor":
                cut = weight.reshape(1, 1, -1)
            case "channel":
                cut = weight[:, None]
            case "group":
                cut = weight.reshape(ROWS, -1, args.group_size)
            case _:
                height, width = args.block_structure
                cut = (
                    weight.reshape(ROWS // height, height, columns // width, width).transpose(1, 2).flatten(2)
                )
        scale, zero = calculate_qparams(cut.amin(-1), cut.amax(-1), args)
        if args.strategy == "tensor":
            scale, zero = scale.reshape(1), zero.reshape(1)
        state = {"weight": weight.to(scale_dtype), "weight_scale": scale.to(scale_dtype)}
        if not args.symmetric:
            state["weight_zero_point"] = zero
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        stored = compressor.compress(dict(state), scheme)
        expected16 = compressor.decompress(dict(stored), scheme)["weight"]
        exact = compressor.decompress({**stored, "weight_scale": stored["weight_scale"].float()}, scheme)[
            "weight"
        ]
        return {f"q.{key}": value for key, value in stored.items()} | {
            "expected.q": exact.float(),
            "expected16.q": expected16,
        }

    for name, layout, compressor, dtype, columns, args in (
        ("w4a16-g32", "pack-quantized", PackedQuantizationCompressor, torch.bfloat16, COLUMNS,
         {"num_bits": 4, "strategy": "group", "group_size": 32}),
        ("w4a16-channel", "pack-quantized", PackedQuantizationCompressor, torch.float16, 100,
         {"num_bits": 4, "strategy": "channel"}),
        ("w4a16-zero", "pack-quantized", PackedQuantizationCompressor, torch.bfloat16, COLUMNS,
         {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
        ("w8a16-channel", "pack-quantized", PackedQuantizationCompressor, torch.bfloat16, 101,
         {"num_bits": 8, "strategy": "channel"}),
        ("w8a16-zero", "pack-quantized", PackedQuantizationCompressor, torch.float16, COLUMNS,
         {"num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False}),
        ("int8-channel", "int-quantized", IntQuantizationCompressor, torch.bfloat16, COLUMNS,
         {"num_bits": 8, "strategy": "channel"}),
        ("int8-tensor", "int-quantized", IntQuantizationCompressor, torch.bfloat16, COLUMNS,
         {"num_bits": 8, "strategy": "tensor"}),
        ("float8-channel", "float-quantized", FloatQuantizationCompressor, torch.bfloat16, COLUMNS,
         {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("float8-tensor", "float-quantized", FloatQuantizationCompressor, torch.bfloat16, COLUMNS,
         {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        ("float8-block", "float-quantized", FloatQuantizationCompressor, torch.bfloat16, COLUMNS,
         {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]}),
    ):  # fmt: skip
        parsed = QuantizationArgs(**args)
        activations = (
            {"num_bits": 8, "dynamic": True, "strategy": "token"} if layout == "float-quantized" else None
        )
        config = {
            "quant_method": "compressed-tensors",
            "format": layout,
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": json.loads(parsed.model_dump_json()),
                    "input_activations": activations,
                    "output_activations": None,
                }
            },
        }
        write(f"compressed-{name}", config, tensors(compressor, parsed, dtype, columns))


if __name__ == "__main__":
    gptq(Path(sys.argv[1]))
    awq(Path(sys.argv[2]))
    compressed()

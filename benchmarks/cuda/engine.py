"""What a user gets: a random checkpoint of a real shape on disk, loaded and generated from through `LLM`.

    python benchmarks/cuda/engine.py FOLDER [--model llama-3.2-1b] [--make]

`--make` writes the checkpoint. Run it twice: the first load packs, the second shows the start from packed weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

STARTED = time.time()


def make(folder: Path, name: str) -> None:
    import torch
    from safetensors.torch import save_file
    from shapes import SHAPES

    shape = SHAPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "gemma2" if shape.gemma else "llama",
        "architectures": ["Gemma2ForCausalLM" if shape.gemma else "LlamaForCausalLM"],
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.fed,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": shape.rope_base,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    if shape.gemma:
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": shape.head_dim,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, device="cuda") * columns**-0.5).bfloat16().cpu()

    mixed, kept = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors = {"model.embed_tokens.weight": matrix(shape.vocabulary, shape.hidden)}
    norms = ["input_layernorm", "post_attention_layernorm"]
    if shape.gemma:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    tensors["model.norm.weight"] = torch.full((shape.hidden,), 0.0 if shape.gemma else 1.0).bfloat16()
    for i in range(shape.layers):
        at = f"model.layers.{i}."
        for part, rows, columns in (
            ("self_attn.q_proj", mixed, shape.hidden),
            ("self_attn.k_proj", kept, shape.hidden),
            ("self_attn.v_proj", kept, shape.hidden),
            ("self_attn.o_proj", shape.hidden, mixed),
            ("mlp.gate_proj", shape.fed, shape.hidden),
            ("mlp.up_proj", shape.fed, shape.hidden),
            ("mlp.down_proj", shape.hidden, shape.fed),
        ):
            tensors[f"{at}{part}.weight"] = matrix(rows, columns)
        for norm in norms:
            tensors[f"{at}{norm}.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--runner", default="auto")
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.folder, arguments.model)
        return
    from octavo import LLM, SamplingParams

    prompt = list(range(100, 228))
    greedy = SamplingParams(max_new_tokens=256, temperature=0, ignore_eos=True)
    with LLM(arguments.folder, device="cuda", context=1024, runner=arguments.runner) as llm:
        loaded = time.time() - STARTED
        llm.generate(prompt, SamplingParams(max_new_tokens=1, temperature=0))
        first = time.time() - STARTED
        print(
            f"{arguments.model}: loaded after {loaded:.2f} s, first token after {first:.2f} s of the process's start"
        )
        for _ in range(3):
            done = llm.generate(prompt, greedy)
            timings = done.timings
            rate, ttft = timings.decode_tokens_per_second, timings.first_token_seconds
            print(f"decode {rate:.1f} tok/s through LLM.generate, first token {1e3 * (ttft or 0):.1f} ms")
        sampled = SamplingParams(max_new_tokens=128, temperature=0.8, top_p=0.9, seed=1, ignore_eos=True)
        print(f"sampled (top-p): {llm.generate(prompt, sampled).timings.decode_tokens_per_second:.1f} tok/s")
        print({key: llm.info()[key] for key in ("runner", "memory", "compiled") if key in llm.info()})


if __name__ == "__main__":
    main()

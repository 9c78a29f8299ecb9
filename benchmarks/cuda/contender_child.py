"""The process of one contender of `contenders.py`: loads a checkpoint its way, generates greedily, says what it took.

The first line says what to load: {"folder", "contender", "context", "sequences", "device"}; every other is
{"prompts", "new_tokens"}, and `new_tokens` 0 asks for the prompts' log-probabilities. `octavo.bench.answering` has the
protocol. Each contender is used as its own documentation says; none gets a streamer, which would make it wait for
every token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from octavo.bench.answering import serve


class Octavo:
    """`octavo:FORMAT`, through `LLM.generate`."""

    def __init__(self, folder: str, variant: str, context: int, sequences: int, device: str) -> None:
        from octavo import LLM, __version__

        self._llm = LLM(folder, quant=variant, device=device, context=context, max_sequences=sequences)
        info = self._llm.info()
        self.about = {
            "version": f"octavo {__version__}",
            "format": info["quant"],
            "runner": info["runner"],
            "weight_bytes": _bytes_a_step(folder, variant, device),
        }

    def generate(self, prompts: list[list[int]], new_tokens: int) -> None:
        from octavo import SamplingParams

        greedy = SamplingParams(
            max_new_tokens=new_tokens, temperature=0.0, repetition_penalty=1.0, ignore_eos=True
        )
        self._llm.generate(prompts, greedy)

    def logprobs(self, prompt: list[int]) -> list[float]:
        return list(self._llm.score(prompt).logprobs)

    def more(self) -> dict[str, Any]:
        return {"device_bytes": sum(self._llm.info()["memory"].values())}


class Transformers:
    """`transformers:MODE`: bf16, fp32, compiled (bf16), torchao, bitsandbytes, script."""

    def __init__(self, folder: str, variant: str, context: int, sequences: int, device: str) -> None:
        import torch
        import transformers

        options: dict[str, Any] = {"dtype": torch.float32 if variant == "fp32" else torch.bfloat16}
        versions = [f"transformers {transformers.__version__}"]
        if variant == "torchao":
            import torchao
            from torchao.quantization import Int8WeightOnlyConfig

            options["quantization_config"] = transformers.TorchAoConfig(Int8WeightOnlyConfig())
            versions.append(f"torchao {torchao.__version__}")
        if variant in ("bitsandbytes", "script"):
            import bitsandbytes

            options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
            versions.append(f"bitsandbytes {bitsandbytes.__version__}")
        if variant == "script":
            torch.set_float32_matmul_precision("high")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=device, **options).eval()
        # Every token is generated, whatever the checkpoint says of sampling and ends.
        model.generation_config = transformers.GenerationConfig(pad_token_id=0)
        self._torch, self._variant, self._loaded, self._device = torch, variant, model, device
        # The script compiles the whole model and calls `generate`, which is the inner model's own.
        self._model = torch.compile(model) if variant == "script" else model
        # A static cache makes `generate` compile the decode step with mode="reduce-overhead".
        self._options = {"cache_implementation": "static"} if variant in ("compiled", "torchao") else {}
        self.about = {
            "version": ", ".join(versions),
            "format": {"torchao": "int8", "bitsandbytes": "llm-int8", "script": "llm-int8"}.get(
                variant, str(model.dtype)[6:]
            ),
            "weight_bytes": _linear_bytes(model),
        }

    def generate(self, prompts: list[list[int]], new_tokens: int) -> None:
        ids = self._torch.tensor(prompts, device=self._device)
        with self._torch.inference_mode():
            self._model.generate(
                input_ids=ids,
                attention_mask=self._torch.ones_like(ids),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                **self._options,
            )
        if self._torch.cuda.is_available():
            self._torch.cuda.synchronize()

    def logprobs(self, prompt: list[int]) -> list[float]:
        torch = self._torch
        ids = torch.tensor([prompt], device=self._device)
        with torch.inference_mode():
            rows = self._loaded(ids).logits[0, :-1].float().log_softmax(-1)
        return rows.gather(1, ids[0, 1:, None])[:, 0].tolist()  # type: ignore[no-any-return]

    def more(self) -> dict[str, Any]:
        from torch._dynamo.utils import counters

        found: dict[str, Any] = {"device_bytes": self._torch.cuda.max_memory_allocated()}
        if self._variant in ("compiled", "torchao", "script"):
            found["compiled_frames"] = counters["frames"]["ok"]
        return found


def _linear_bytes(model: Any) -> int:
    """Weights that a decode step reads: of linears and the head; nothing of a table of which it reads a row."""
    import torch

    total = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, torch.nn.Linear) and weight is not None:
            # torchao's tensors say the type they stand for.
            plain = type(weight) in (torch.nn.Parameter, torch.Tensor) or weight.dtype == torch.int8
            inner = type(getattr(weight, "data", weight))
            total += weight.numel() * (weight.element_size() if plain and inner is torch.Tensor else 1)
    return total


def _bytes_a_step(folder: str, quant: str, device: str) -> int:
    from octavo.bench.subject import weight_bytes_per_token
    from octavo.loading import plan_model
    from octavo.settings import Settings

    return weight_bytes_per_token(plan_model(Settings(model=folder, quant=quant, device=device)))


class Contender:
    def __init__(self, ask: dict[str, Any]) -> None:
        library, _, variant = ask["contender"].partition(":")
        kinds: dict[str, Callable[..., Any]] = {"octavo": Octavo, "transformers": Transformers}
        started = time.perf_counter()
        self._model = kinds[library](ask["folder"], variant, ask["context"], ask["sequences"], ask["device"])
        self.facts = {**self._model.about, "load_seconds": time.perf_counter() - started}

    def run(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        if new_tokens == 0:
            return {"logprobs": [self._model.logprobs(prompt) for prompt in prompts]}
        # Other prompts: nothing of a prompt may be reused.
        backwards = [prompt[::-1] for prompt in prompts]
        started = time.perf_counter()
        self._model.generate(backwards, 1)
        first = time.perf_counter() - started
        started = time.perf_counter()
        self._model.generate(prompts, new_tokens)
        whole = time.perf_counter() - started
        return {"first_token_seconds": first, "total_seconds": whole, **self._model.more()}


if __name__ == "__main__":
    serve(Contender)

"""The process in which `bench --peer transformers` runs: loads the model, and answers prompts with timings.

`octavo.bench.answering` says what is asked. To load: model, revision, gguf_file, dtype, int8, compiled, threads and
device.
Generation is `model.generate`, greedy, as its documentation has it; a streamer takes the times.
"""

from __future__ import annotations

import time
from typing import Any

from octavo.bench.answering import serve
from octavo.bench.memory import process_memory


class Stopwatch:
    """A streamer: `generate` hands it the prompt, then the token of every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


class Model:
    def __init__(self, ask: dict[str, Any]) -> None:
        import torch
        import transformers

        started = time.perf_counter()
        self._torch = torch
        if ask["threads"] is not None:
            torch.set_num_threads(ask["threads"])
        where = {"revision": ask["revision"]} if ask["revision"] else {}
        if ask["gguf_file"]:
            where["gguf_file"] = ask["gguf_file"]
        model = transformers.AutoModelForCausalLM.from_pretrained(
            ask["model"], dtype=getattr(torch, ask["dtype"]), trust_remote_code=False, **where
        )
        self._model = model.to(ask["device"]).eval()
        if ask["int8"]:
            _quantize_linears(self._model)
        # Every token is generated, whatever the checkpoint says of sampling and ends.
        plain: Any = transformers.GenerationConfig
        self._model.generation_config = plain(pad_token_id=0)
        self._options: dict[str, Any] = {}
        if ask["compiled"]:
            self._model.forward = torch.compile(self._model.forward, dynamic=False)
            self._options["cache_implementation"] = "static"
        self.facts = {
            "version": f"{transformers.__version__} (torch {torch.__version__})",
            "load_seconds": time.perf_counter() - started,
        }

    def run(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """Seconds from the call to the first and to the last token of all sequences."""
        torch, watch = self._torch, Stopwatch()
        ids = torch.tensor(prompts, device=self._model.device)
        started = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                streamer=watch,
                **self._options,
            )
        _, first, *_, last = watch.times
        return {
            "first_token_seconds": first - started,
            "total_seconds": last - started,
            "peak_bytes": process_memory().peak_bytes,
        }


def _quantize_linears(model: Any) -> None:
    """Every linear becomes torch's weight-only int8 with a scale a row; a tied head gets codes of its own."""
    import torch

    class Int8Linear(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            weight = linear.weight.detach().float()
            self.scales = (weight.abs().amax(1) / 127).clamp_min(1e-12)
            self.codes = (weight / self.scales[:, None]).round().to(torch.int8)
            self.scales = self.scales.to(linear.weight.dtype)
            self.bias = linear.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = x.reshape(-1, x.shape[-1])
            y = torch._weight_int8pack_mm(rows, self.codes, self.scales).reshape(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias

    linears = [
        (name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    for name, linear in linears:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Int8Linear(linear))


if __name__ == "__main__":
    serve(Model)

"""The process in which `bench --peer transformers` runs: loads the model, and answers prompts with timings.

Reads JSON lines on standard input and writes one for each (`octavo.bench.child`). The first says what to load:
model, revision, gguf_file, dtype, int8, compiled, threads, device; the others are {"prompts": [[id]], "new_tokens": n}.
Generation is `model.generate`, greedy, as its documentation has it; a streamer takes the times.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

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


def answers(questions: Iterator[str]) -> Iterator[dict[str, Any]]:
    try:
        model = Model(json.loads(next(questions)))
        yield model.facts
        for question in questions:
            yield model.run(**json.loads(question))
    except Exception as error:  # the parent reports it; its text is all there is
        text = str(error).strip().partition("\n")[0]
        yield {"error": f"{type(error).__name__}: {text}"}


def main() -> None:
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)  # what libraries print is not an answer
        _serve(sys.stdin, channel)


def _serve(questions: TextIO, channel: TextIO) -> None:
    for answer in answers(iter(questions)):
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


if __name__ == "__main__":
    main()

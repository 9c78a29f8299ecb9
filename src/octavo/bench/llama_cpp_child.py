"""The process in which llama-cpp-python runs: loads the file, and answers prompts with timings, greedily.

`octavo.bench.answering` says what is asked. To load: model (a .gguf file), threads, gpu (whether to put layers there),
context_tokens.
"""

from __future__ import annotations

import time
from typing import Any

from octavo.bench.answering import serve
from octavo.bench.memory import process_memory


class Model:
    def __init__(self, ask: dict[str, Any]) -> None:
        import llama_cpp

        started = time.perf_counter()
        self._llama = llama_cpp.Llama(
            ask["model"],
            n_ctx=ask["context_tokens"],
            n_threads=ask["threads"],
            n_threads_batch=ask["threads"],
            n_gpu_layers=-1 if ask["gpu"] else 0,
            verbose=False,
        )
        self.facts = {
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "load_seconds": time.perf_counter() - started,
        }

    def run(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """One sequence: its binding decodes no more of them together."""
        (prompt,) = prompts
        self._llama.reset()
        started = time.perf_counter()
        self._llama.eval(prompt)
        token = self._llama.sample(temp=0.0)
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            self._llama.eval([token])
            token = self._llama.sample(temp=0.0)
        return {
            "first_token_seconds": first - started,
            "total_seconds": time.perf_counter() - started,
            "peak_bytes": process_memory().peak_bytes,
        }


if __name__ == "__main__":
    serve(Model)

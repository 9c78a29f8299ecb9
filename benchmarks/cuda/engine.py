"""What a user gets: a random checkpoint of a real shape on disk, loaded and generated from through `LLM`.

    python benchmarks/cuda/engine.py FOLDER [--model llama-3.2-1b] [--make]

`--make` writes the checkpoint. Run it twice: the first load packs, the second shows the start from packed weights.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

STARTED = time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--runner", default="auto")
    arguments = parser.parse_args()
    if arguments.make:
        from checkpoints import make_checkpoint

        make_checkpoint(arguments.folder, arguments.model)
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

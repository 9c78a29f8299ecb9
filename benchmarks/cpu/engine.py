"""What `LLM.generate` leaves of the bare runner's speed: one sequence, greedy, rounds interleaved.

    python benchmarks/cpu/engine.py [MODEL] [--quant int8] [--threads 1 2] [--rounds 7]

Both decode the same number of tokens from the same context; the ratio is taken within a round. The bare runner is
benchmarks/cpu/decode.py's loop of one C call for the model and one for sampling.
"""

from __future__ import annotations

import argparse
import statistics

from decode import DECODE_TOKENS, decode, load

from octavo import LLM, SamplingParams

_PROMPT = list(range(1000, 1016))


def generate(llm: LLM) -> float:
    """Tokens a second between the first token and the last."""
    params = SamplingParams(max_new_tokens=DECODE_TOKENS + 1, temperature=0.0, ignore_eos=True)
    speed = llm.generate(_PROMPT, params).timings.decode_tokens_per_second
    assert speed is not None
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="default: the default model")
    parser.add_argument("--quant", default="int8")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    bare = load(arguments.model, arguments.quant, None)
    print(f"{'threads':>7} {'LLM.generate':>12} {'bare runner':>12}  ratio")
    for threads in arguments.threads:
        runner = bare.runner(threads)
        with LLM(
            arguments.model, quant=arguments.quant, device="cpu", threads=threads, speculation="off"
        ) as llm:
            generate(llm)
            decode(bare, runner, len(_PROMPT), 1)
            pairs = [(generate(llm), decode(bare, runner, len(_PROMPT), 1)) for _ in range(arguments.rounds)]
        runner.close()
        ratios = [ours / theirs for ours, theirs in pairs]
        ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            f"{threads:7} {ours:12.1f} {theirs:12.1f}  "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()

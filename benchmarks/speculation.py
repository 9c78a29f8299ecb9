"""What prompt lookup gains and costs: decode speed with it over decode speed without, one request at a time.

    python benchmarks/speculation.py [-m MODEL] [--tokens N] [--rounds R] [--json]

Copy-heavy tasks repeat their prompt (rename in code, correct a text, fill a table); the others do not. Both models
are loaded once and asked by turns, so that what else the machine does falls on both alike; a task's ratio is the
median of its rounds' ratios, shown with the least and the most. Every pair of outputs is compared: they must be the
same tokens. --processor-time counts that of the process instead of the clock's, for a busy machine and --threads 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

from octavo import LLM, SamplingParams
from octavo.types import Completion

_CODE = """def load_rows(path, limit=None):
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if limit is not None and number >= limit:
                break
            name, amount, day = line.rstrip("\\n").split(",")
            rows.append({"name": name, "amount": float(amount), "day": day})
    return rows


def total_by_name(rows):
    totals = {}
    for row in rows:
        totals[row["name"]] = totals.get(row["name"], 0.0) + row["amount"]
    return totals
"""
_TEXT = (
    "The harbor lies on the north side of the island, below the old lighthouse. In summer the ferry from the "
    "mainland comes three times a day, and the square behind the quay fills with people who carry tents, "
    "bicycles and boxes of fruit. In winter it comes on Tuesdays only, and whoever misses it has to stay for "
    "another week in the only inn that remains open, a low white house with eleven rooms and a large stove."
)

COPY = {
    "repeat code": f"# The file:\n\n{_CODE}\n\n# The file again:\n\n{_CODE}\n\n# And once more:\n\ndef",
    "repeat text": f"First copy: {_TEXT}\n\nSecond copy, word for word: {_TEXT}\n\nThird copy, word for word:",
    "lines of a list": "".join(f"item {i}: name, amount, day\n" for i in range(24)),
}
OTHER = {
    "story": "Once upon a time there was a young fox who had never seen the sea.",
    "essay": "The causes of the First World War are many. Historians have argued about",
    "dialogue": 'He looked up from his book. "You are late," he said. She',
    "code": "# A class that keeps a moving average of the last n values.\nclass MovingAverage:\n",
}
SAMPLED = {f"{name}, sampled": prompt for name, prompt in OTHER.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-m", "--model")
    parser.add_argument("--quant", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--json", action="store_true")
    said = parser.parse_args()
    fixed: dict[str, Any] = {
        "quant": said.quant,
        "device": "cpu",
        "runner": "cpu",
        "context": 2048,
        "threads": said.threads,
    }
    rows = []
    with LLM(said.model, speculation="off", **fixed) as plain, LLM(said.model, **fixed) as guessing:
        for kind, tasks in (("copy", COPY), ("other", OTHER), ("other", SAMPLED)):
            for name, prompt in tasks.items():
                temperature = 0.8 if tasks is SAMPLED else 0.0
                params = SamplingParams(
                    max_new_tokens=said.tokens, temperature=temperature, seed=1, ignore_eos=True
                )
                found = compare(plain, guessing, prompt, params, said.rounds, said.processor_time)
                rows.append({"kind": kind, "task": name} | found)
                if not said.json:
                    show(rows[-1])
    if said.json:
        json.dump(rows, sys.stdout)
        print()


def compare(
    plain: LLM, guessing: LLM, prompt: str, params: SamplingParams, rounds: int, processor_time: bool
) -> dict[str, Any]:
    speeds: tuple[list[float], list[float]] = ([], [])
    drafts = [0, 0]
    for turn in range(rounds + 1):
        pair: dict[int, Completion] = {}
        seconds = [0.0, 0.0]
        before = guessing.info()["engine"]
        for which in (0, 1) if turn % 2 else (1, 0):
            started = time.process_time()
            pair[which] = (plain, guessing)[which].generate(prompt, params)
            seconds[which] = time.process_time() - started
        assert pair[0].token_ids == pair[1].token_ids, "guesses changed the output"
        if turn == 0:
            continue  # warms caches
        after = guessing.info()["engine"]
        for number, key in enumerate(("drafts_proposed", "drafts_accepted")):
            drafts[number] += after[key] - before[key]
        for which in (0, 1):
            speed = pair[which].timings.decode_tokens_per_second
            if processor_time:  # the prompt's pages are reused, so that nearly all of it is decoding
                speed = len(pair[which].token_ids) / seconds[which]
            assert speed is not None
            speeds[which].append(speed)
    medians = [statistics.median(each) for each in speeds]
    ratios = sorted(guessed / without for without, guessed in zip(*speeds, strict=True))
    return {
        "plain_tokens_per_second": medians[0],
        "tokens_per_second": medians[1],
        "ratio": statistics.median(ratios),
        "least_ratio": ratios[0],
        "most_ratio": ratios[-1],
        "drafts_proposed": drafts[0] // rounds,
        "drafts_accepted": drafts[1] // rounds,
    }


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['kind']:6} {row['task']:18} {row['plain_tokens_per_second']:7.1f} -> "
        f"{row['tokens_per_second']:7.1f} tok/s  "
        f"{row['ratio']:5.3f}x ({row['least_ratio']:.2f} .. {row['most_ratio']:.2f})  "
        f"{row['drafts_accepted']} of {row['drafts_proposed']} guesses true",
        flush=True,
    )


if __name__ == "__main__":
    main()

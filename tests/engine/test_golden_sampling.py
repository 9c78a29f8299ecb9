"""Golden vectors of the sampling law for runners in other languages; docs/sampling.md says what is in them.

`python tests/engine/test_golden_sampling.py --write` writes golden_sampling.json anew from the numpy law.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from octavo.engine.sampling import (
    GREEDY_BELOW,
    TokenCounts,
    gumbel,
    keep,
    philox4x32,
    random_words,
    sample_token,
    scale,
    shape_logits,
    token_logprob,
)
from octavo.errors import NumericalError
from octavo.runners.masks import unpack_mask
from octavo.types import Sampling

PATH = Path(__file__).with_name("golden_sampling.json")
VOCAB = 101  # no multiple of 4 or 32
LOGIT_MARGIN, SUM_MARGIN = 1e-3, 1e-4
F = np.float32

SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 5e-6},
    {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 1e-3},
    {"temperature": 0.7},
    {},
    {"temperature": 3.0},
    {"choice": 3},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.05},
    {"top_p": 0.9, "temperature": 1.5},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.6},
    {"frequency_penalty": 0.7, "top_k": 3},
    {"presence_penalty": 1.5, "top_k": 3},
    {"presence_penalty": -1.5},
    {"logit_bias": [[2, 3.25], [17, -100.0], [100, 7.0]]},
    {"top_k": 20, "top_p": 0.83, "min_p": 0.05, "temperature": 0.8},
    {
        "temperature": 1.2,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.25,
        "presence_penalty": 0.75,
        "logit_bias": [[1, -2.5], [64, 4.0]],
        "top_k": 30,
        "top_p": 0.95,
        "min_p": 0.02,
        "choice": 1,
    },
]
MASKED = [{}, {"temperature": 0.0}, {"top_k": 4}, {"top_p": 0.7}]


def rows() -> dict[str, np.ndarray]:
    source = np.random.default_rng(8)
    normal = source.standard_normal((5, VOCAB)).astype(F)
    holes = normal[3] * F(2)
    holes[source.permutation(VOCAB)[: VOCAB // 2]] = -np.inf
    peaked = normal[2].copy()
    peaked[77] = F(14.5)
    broken = {"nan": np.nan, "plus infinity": np.inf}
    return {
        "wide": normal[0] * F(3),
        "flat": normal[1] * F(0.1),
        "ties": source.choice(np.array([-1.0, -0.0, 0.0, 1.5], F), VOCAB),
        "peaked": peaked,
        "far": normal[4] * F(2) + F(300),
        "holes": holes,
        **{name: np.where(np.arange(VOCAB) == 60, F(bad), normal[0]) for name, bad in broken.items()},
        "minus infinity": np.full(VOCAB, -np.inf, F),
    }


def to_sampling(entry: dict) -> Sampling:
    bias = tuple((token, value) for token, value in entry.get("logit_bias", ()))
    return Sampling(**{**entry, "logit_bias": bias})


def to_json(values) -> list:
    """fp32 values as the shortest decimals that give them back."""
    return [float(str(value)) if np.isfinite(value) else str(float(value)) for value in values]


def decide(row: np.ndarray, case: dict) -> tuple[int | None, list[int] | None]:
    """Token and kept ids of a case by the law."""
    sampling = to_sampling(case["sampling"])
    tokens = case["prompt"] + case["generated"]
    counts = TokenCounts.of(tokens, len(case["prompt"]), VOCAB)
    allowed = None if case["mask"] is None else unpack_mask(np.array(case["mask"], np.uint32), VOCAB)
    try:
        token = sample_token(row, sampling, len(tokens), counts, allowed)
    except NumericalError:
        return None, None
    if sampling.temperature < GREEDY_BELOW:
        return token, None
    shaped = shape_logits(row, sampling, counts, allowed)
    return token, keep(shaped, scale(shaped, sampling.temperature), sampling).tolist()


def margin(row: np.ndarray, case: dict) -> float:
    """How far the nearest decision that rounding could change is from changing; at least 1 is far enough."""
    sampling = to_sampling(case["sampling"])
    _, kept = decide(row, case)
    if kept is None:
        return math.inf
    tokens = case["prompt"] + case["generated"]
    allowed = None if case["mask"] is None else unpack_mask(np.array(case["mask"], np.uint32), VOCAB)
    shaped = shape_logits(row, sampling, TokenCounts.of(tokens, len(case["prompt"]), VOCAB), allowed)
    scaled = scale(shaped, sampling.temperature).astype(np.float64)
    closest = math.inf
    order = np.argsort(-shaped, kind="stable")
    order = order[: sampling.top_k or None]
    if sampling.top_p < 1:
        weights = np.exp(scaled[order])
        closest = float(np.abs(np.cumsum(weights) / weights.sum() - sampling.top_p).min()) / SUM_MARGIN
    if sampling.min_p > 0:
        away = np.abs(scaled[np.isfinite(scaled)] - math.log(sampling.min_p))
        # The best token sits at 0 exactly: with min_p = 1 that decision is exact too.
        closest = min(closest, float(away[away > 0].min(initial=math.inf)) / LOGIT_MARGIN)
    if len(kept) > 1:
        noise = gumbel(random_words(np.array(kept), len(tokens), sampling.seed, sampling.choice))
        best, second = np.sort(scaled[kept] + noise)[[-1, -2]]
        closest = min(closest, float(best - second) / LOGIT_MARGIN)
    return closest


def cases() -> list[dict]:
    source = np.random.default_rng(80)
    table = rows()
    plain = [(name, sampling, None) for name in list(table)[:6] for sampling in SAMPLINGS]
    masked = [
        (name, sampling, source.integers(0, 2**32, 4).tolist())
        for name in ("wide", "ties", "holes")
        for sampling in MASKED
    ]
    broken = [(name, sampling, None) for name in list(table)[6:] for sampling in ({}, {"temperature": 0.0})]
    broken.append(("wide", {}, [0, 0, 0, 0]))
    broken.append(("far", {"repetition_penalty": 1e-37}, None))
    made = []
    for number, (name, sampling, mask) in enumerate([*plain, *masked, *broken]):
        # The row's best tokens are in prompt and output, so that penalties have something to change.
        best = np.argsort(-table[name], kind="stable")[:5].tolist()
        prompt, generated = [3, 17, 17, best[0], best[2], 100, 0], [5, best[1], best[1], best[3], best[1], 63]
        case = {"row": name, "prompt": prompt, "generated": generated[: number % 7], "mask": mask}
        for attempt in range(200):
            seed = (number * 0x9E3779B97F4A7C15 + attempt) % 2**64
            case["sampling"] = {**sampling, "seed": seed}
            if margin(table[name], case) >= 1:
                break
        else:
            raise AssertionError(f"no seed with a margin for {case}")
        case["token"], case["kept"] = decide(table[name], case)
        made.append(case)
    return made


def build() -> dict:
    counters = [[0] * 4, [2**32 - 1] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]]
    keys = [[0, 0], [2**32 - 1] * 2, [0xA4093822, 0x299F31D0]]
    philox = [
        {
            "counter": [f"{word:08x}" for word in counter],
            "key": [f"{word:08x}" for word in key],
            "words": [
                f"{word:08x}" for word in philox4x32(np.array([counter], np.uint32), tuple(key))[0].tolist()
            ],
        }
        for counter, key in zip(counters, keys, strict=True)
    ]
    noise = []
    for seed, choice, position in [
        (0, 0, 0),
        (1, 0, 12),
        (2**64 - 1, 7, 8191),
        (0x123456789ABCDEF, 2**31, 1),
    ]:
        ids = [0, 1, 2, 3, 4, 100, 49151, 262143]
        words = random_words(np.array(ids), position, seed, choice)
        noise.append(
            {
                "seed": seed,
                "choice": choice,
                "position": position,
                "token_ids": ids,
                "words": words.tolist(),
                "gumbel": to_json(gumbel(words)),
            }
        )
    table = rows()
    logprobs = []
    for name in list(table)[:6]:
        for token, top in ((0, 0), (77, 4), (100, VOCAB)):
            if np.isfinite(table[name][token]) and (top < VOCAB or np.isfinite(table[name]).all()):
                entry = token_logprob(table[name], token, top)
                values = to_json([F(value) for _, value in entry.top])
                logprobs.append(
                    {
                        "row": name,
                        "token": token,
                        "top": top,
                        "logprob": to_json([F(entry.logprob)])[0],
                        "alternatives": [[i, v] for (i, _), v in zip(entry.top, values, strict=True)],
                    }
                )
    return {
        "vocab_size": VOCAB,
        "philox": philox,
        "noise": noise,
        "rows": {name: to_json(row) for name, row in table.items()},
        "cases": cases(),
        "logprobs": logprobs,
    }


def dump(golden: dict) -> str:
    """One entry a line: small, and a change shows where it is."""
    parts = []
    for name, value in golden.items():
        if isinstance(value, list):
            lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in value)
            parts.append(f'"{name}":[\n{lines}\n]')
        elif isinstance(value, dict):
            lines = ",\n".join(
                f"{json.dumps(k)}:{json.dumps(v, separators=(',', ':'))}" for k, v in value.items()
            )
            parts.append(f'"{name}":{{\n{lines}\n}}')
        else:
            parts.append(f'"{name}":{json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


# --- tests -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(PATH.read_text())


def row_of(golden: dict, name: str) -> np.ndarray:
    return np.array([float(value) for value in golden["rows"][name]], dtype=F)


def test_the_file_is_what_the_law_gives(golden):
    """Tokens, order and Philox are exact; noise and logprobs within the law's bounds on any platform."""
    assert golden["philox"] == build()["philox"]
    for entry in golden["noise"]:
        words = random_words(np.array(entry["token_ids"]), entry["position"], entry["seed"], entry["choice"])
        assert words.tolist() == entry["words"]
        assert gumbel(words).tolist() == pytest.approx(entry["gumbel"], abs=4e-6)
    for case in golden["cases"]:
        assert decide(row_of(golden, case["row"]), case) == (case["token"], case["kept"]), case
    for entry in golden["logprobs"]:
        found = token_logprob(row_of(golden, entry["row"]), entry["token"], entry["top"])
        assert found.logprob == pytest.approx(entry["logprob"], rel=1e-6, abs=1e-4)
        assert [i for i, _ in found.top] == [i for i, _ in entry["alternatives"]]
        assert [v for _, v in found.top] == pytest.approx(
            [v for _, v in entry["alternatives"]], rel=1e-6, abs=1e-4
        )


def test_the_file_is_written_as_described(golden):
    assert dump(golden) == PATH.read_text()
    assert PATH.stat().st_size < 100_000
    assert golden.keys() == build().keys()
    assert len(golden["cases"]) == len(cases())


def test_no_case_hangs_on_rounding(golden):
    assert min(margin(row_of(golden, case["row"]), case) for case in golden["cases"]) >= 1


def test_every_step_is_covered(golden):
    """Each sampling field is off its default somewhere, and switching it off changes a token or the kept ids."""
    names = {field.name for field in fields(Sampling)} - {"logprobs"}
    decisive = set()
    for case in golden["cases"]:
        for name in case["sampling"]:
            without = {key: value for key, value in case["sampling"].items() if key != name}
            if decide(row_of(golden, case["row"]), {**case, "sampling": without}) != (
                case["token"],
                case["kept"],
            ):
                decisive.add(name)
        if case["mask"] and decide(row_of(golden, case["row"]), {**case, "mask": None})[1] != case["kept"]:
            decisive.add("mask")
    assert decisive == names | {"mask"}


@pytest.mark.parametrize("change", ["position", "lane", "order"])
def test_a_wrong_law_is_caught(golden, monkeypatch, change):
    """Negative controls: an off-by-one position, swapped lanes, ties by highest id."""
    module = sys.modules["octavo.engine.sampling"]
    sound = module.random_words
    if change == "position":
        monkeypatch.setattr(module, "random_words", lambda ids, p, s, c: sound(ids, p + 1, s, c))
    elif change == "lane":
        monkeypatch.setattr(module, "random_words", lambda ids, p, s, c: sound(ids ^ 1, p, s, c))
    else:
        best_first = module._best_first
        monkeypatch.setattr(
            module, "_best_first", lambda values, n: len(values) - 1 - best_first(values[::-1].copy(), n)
        )
    wrong = [
        case
        for case in golden["cases"]
        if decide(row_of(golden, case["row"]), case) != (case["token"], case["kept"])
    ]
    assert len(wrong) >= (3 if change == "order" else 30)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/engine/test_golden_sampling.py --write")
    PATH.write_text(dump(build()))

"""The law on the device against the numpy law: its golden vectors, and random rows, parameters and batches."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine import sampling as law
from octavo.errors import NumericalError
from octavo.runners.base import SlotState
from octavo.runners.cuda import shape_logits
from octavo.runners.cuda.draw import DrawTile
from octavo.runners.cuda.laws import SlotLaws
from octavo.runners.cuda.logprobs import read_logprobs
from octavo.runners.cuda.pick import TOLD_STEPS
from octavo.runners.cuda.sampling import Row, SampleStep
from octavo.runners.masks import unpack_mask
from octavo.types import Sampling, TokenLogprob

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "engine" / "golden_sampling.json").read_text(encoding="utf-8")
)


@dataclass(frozen=True)
class Case:
    """A row to sample from."""

    logits: np.ndarray
    sampling: Sampling
    prompt: Sequence[int] = (0,)
    generated: Sequence[int] = ()
    mask: np.ndarray | None = None
    replaced: np.ndarray | None = None

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.generated]


@dataclass
class Bench:
    """Slots of a device, and one `SampleStep`."""

    device: torch.device
    vocabulary: int
    rows: int = 4
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.laws = SlotLaws.empty(self.rows, self.vocabulary, self.device)
        self.last = torch.zeros(self.rows + 1, dtype=torch.int32, device=self.device)
        self.positions = torch.zeros_like(self.last)
        told = torch.zeros(
            (self.rows + 1, TOLD_STEPS), dtype=torch.int32, pin_memory=self.device.type == "cuda"
        )
        self.told = told
        self.step = SampleStep(
            self.laws, self.last, self.positions, told, self.rows, multiprocessors=self.rows
        )

    def sample(self, cases: Sequence[Case]) -> list[int]:
        """The case of row i is in slot `rows - 1 - i`."""
        kept: list[torch.Tensor] = []
        rows: list[Row] = []
        masks: list[np.ndarray] = []
        for index, case in enumerate(cases):
            slot = self.rows - 1 - index
            self.laws.open(slot, SlotState(case.ids, len(case.prompt), case.sampling))
            self.positions[slot] = len(case.ids) - 1
            own = torch.from_numpy(case.logits).to(self.device)
            given = own if case.replaced is None else torch.from_numpy(case.replaced).to(self.device)
            kept += [own, given]
            top = case.sampling.logprobs
            place = -1
            if case.mask is not None:
                place = len(masks)
                masks.append(case.mask)
            rows.append(Row(slot, given.data_ptr(), own.data_ptr(), place, -1 if top is None else top))
        self.step.set_rows(rows, masks)
        with np.errstate(over="ignore"):  # a penalty may overflow: a numerical error of the row
            self.step.launch()
        with np.errstate(invalid="ignore"):  # of rows that are not finite, which nobody reads
            self.step.launch_logprobs()
        return self.step.sampled.tolist()[: len(cases)]

    def logprobs(self, cases: Sequence[Case]) -> list[TokenLogprob]:
        tops = [case.sampling.logprobs or 0 for case in cases]
        return read_logprobs(self.step.found.cpu(), self.step.sampled.tolist()[: len(cases)], tops)


def wanted(case: Case) -> int:
    """The numpy law's token; -1: a numerical error."""
    counts = law.TokenCounts.of(case.ids, len(case.prompt), len(case.logits))
    allowed = None if case.mask is None else unpack_mask(case.mask, len(case.logits))
    try:
        law.check_finite(case.logits)
        given = case.logits if case.replaced is None else case.replaced
        return law.sample_token(given, case.sampling, len(case.ids), counts, allowed)
    except NumericalError:
        return -1


def row(name: str) -> np.ndarray:
    return np.array([float(value) for value in GOLDEN["rows"][name]], np.float32)


def golden_case(case: dict[str, Any]) -> Case:
    fields = dict(case["sampling"])
    if "logit_bias" in fields:
        fields["logit_bias"] = tuple((int(i), float(b)) for i, b in fields["logit_bias"])
    mask = None if case["mask"] is None else np.array(case["mask"], np.uint32)
    return Case(row(case["row"]), Sampling(**fields), case["prompt"], case["generated"], mask)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces and tiles a row in vocabularies that the interpreter can look at."""
    monkeypatch.setattr(shape_logits, "PIECE_TOKENS", 64)
    monkeypatch.setattr("octavo.runners.cuda.logprobs.PIECE_TOKENS", 64)
    monkeypatch.setattr("octavo.runners.cuda.sampling.draw_tile_for", lambda *_: DrawTile(1, 64, 64, 128, 4))


def test_golden_cases(device: torch.device) -> None:
    # The interpreter takes a quarter of a second a case; what it leaves out is not of another kind.
    cases = GOLDEN["cases"][:: 1 if device.type == "cuda" else 3]
    bench = Bench(device, GOLDEN["vocab_size"])
    for first in range(0, len(cases), bench.rows):
        batch = cases[first : first + bench.rows]
        got = bench.sample([golden_case(case) for case in batch])
        assert got == [-1 if case["token"] is None else case["token"] for case in batch]


def test_slots_move_on_and_count(device: torch.device) -> None:
    bench = Bench(device, 3)
    case = Case(np.array([1.0, 2.0, 1.5], np.float32), Sampling(temperature=0.0, presence_penalty=0.8))
    assert bench.sample([case]) == [1]
    tokens = [1]
    for _ in range(2):
        bench.step.launch()
        tokens.append(int(bench.step.sampled[0]))
    assert tokens == [1, 2, 1]
    assert bench.laws.counts[3].tolist()[1:] == [2, 1]
    assert int(bench.positions[3]) == 3
    assert int(bench.last[3]) == 1
    assert bench.told[3].tolist() == [0, *tokens]  # the tokens of positions 1, 2 and 3
    assert bench.positions[:3].tolist() == [0, 0, 0]


def test_a_processors_logits_are_sampled_and_the_models_reported(device: torch.device) -> None:
    own = np.array([3.0, 1.0, 0.0, -1.0], np.float32)
    case = Case(own, Sampling(temperature=0.0, logprobs=2), replaced=own[::-1].copy())
    bench = Bench(device, 4)
    assert bench.sample([case]) == [3]
    (got,) = bench.logprobs([case])
    want = law.token_logprob(own, 3, 2)
    assert got.logprob == pytest.approx(want.logprob, abs=1e-5)
    assert [i for i, _ in got.top] == [0, 1]
    broken = Case(np.full(4, np.nan, np.float32), case.sampling, replaced=own)
    assert bench.sample([broken]) == [-1]


@pytest.mark.parametrize("case", GOLDEN["logprobs"], ids=lambda case: str(GOLDEN["logprobs"].index(case)))
def test_golden_logprobs(case: dict[str, Any], device: torch.device) -> None:
    logits = row(case["row"])
    top = min(case["top"], 20)
    # A bias of its own makes any token the sampled one.
    bias = ((case["token"], 1e6),)
    bench = Bench(device, len(logits))
    cases = [Case(logits, Sampling(temperature=0.0, logit_bias=bias, logprobs=top))]
    if bench.sample(cases) != [case["token"]]:
        assert case["logprob"] == "-inf"
        return
    (got,) = bench.logprobs(cases)
    want = float(case["logprob"])
    assert got.logprob == want or math.isclose(got.logprob, want, abs_tol=1e-4)
    assert [i for i, _ in got.top] == [i for i, _ in case["alternatives"]][: len(got.top)]
    assert len(got.top) == min(top, len(case["alternatives"]))


# --- any mixture -------------------------------------------------------------------------------------

VOCABULARY = 150


@st.composite
def cases(draw: st.DrawFn) -> Case:
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=VOCABULARY) * draw(st.sampled_from([0.3, 3.0, 12.0]))).astype(np.float32)
    if draw(st.booleans()):
        logits = np.round(logits)  # many ties
    if draw(st.booleans()):
        logits[rng.random(VOCABULARY) < 0.3] = -np.inf
        logits[17] = 0.5
    ids = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)
    off = st.just
    sampling = Sampling(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])),
        top_k=draw(st.one_of(off(0), st.integers(1, 40), st.integers(100, 400))),
        top_p=draw(st.one_of(off(1.0), st.floats(0.01, 0.999))),
        min_p=draw(st.one_of(off(0.0), st.floats(0.001, 1.0))),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.7])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.4])),
        presence_penalty=draw(st.sampled_from([0.0, -0.7])),
        logit_bias=tuple(sorted(dict.fromkeys(draw(ids), 1.25).items())),
        seed=draw(st.integers(0, 2**64 - 1)),
        choice=draw(st.integers(0, 3)),
    )
    mask = None
    if draw(st.booleans()):
        mask = rng.integers(0, 2**32, -(-VOCABULARY // 32), dtype=np.uint32)
    return Case(logits, sampling, [3, *draw(ids)], draw(ids), mask)


def may_differ(case: Case, token: int) -> bool:
    """Whether rounding may decide between the numpy law's token and this one: top_p's edge, or a near-tie."""
    counts = law.TokenCounts.of(case.ids, len(case.prompt), len(case.logits))
    allowed = None if case.mask is None else unpack_mask(case.mask, len(case.logits))
    shaped = law.shape_logits(case.logits, case.sampling, counts, allowed)
    scaled = law.scale(shaped, case.sampling.temperature)
    noise = law.gumbel(
        law.random_words(np.arange(len(scaled)), len(case.ids), case.sampling.seed, case.sampling.choice)
    )
    found = []
    for shift in (-1e-5, 0.0, 1e-5):
        moved = Sampling(
            **{name: getattr(case.sampling, name) for name in ("top_k", "min_p", "temperature")},
            top_p=min(1.0, max(1e-9, case.sampling.top_p + shift)),
        )
        ids = law.keep(shaped, scaled, moved)
        total = scaled[ids] + noise[ids]
        found += ids[total >= total.max() - 1e-5].tolist()
    return token in found


@settings(max_examples=12, deadline=None)
@given(batch=st.lists(cases(), min_size=1, max_size=4))
def test_any_mixture_is_the_numpy_law(batch: list[Case]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(device, VOCABULARY)
    for case, token in zip(batch, bench.sample(batch), strict=True):
        want = wanted(case)
        assert token == want or (want >= 0 and may_differ(case, token))

"""The law in device tensors against the numpy law's golden vectors: no interpreter, every case must give its token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo.runners.base import SlotState
from octavo.runners.cuda.sampling import logprobs_of, sample_row, slot_law, unpack_mask
from octavo.types import Sampling

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "engine" / "golden_sampling.json").read_text(encoding="utf-8")
)


def row(name: str, device: torch.device) -> torch.Tensor:
    return torch.tensor([float(value) for value in GOLDEN["rows"][name]], device=device)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: str(GOLDEN["cases"].index(case)))
def test_golden_cases(case: dict[str, Any], device: torch.device) -> None:
    logits = row(case["row"], device)
    fields = dict(case["sampling"])
    if "logit_bias" in fields:
        fields["logit_bias"] = tuple((int(i), float(b)) for i, b in fields["logit_bias"])
    ids = [*case["prompt"], *case["generated"]]
    law = slot_law(SlotState(ids, len(case["prompt"]), Sampling(**fields)), len(logits), device)
    mask = case["mask"]
    allowed = None if mask is None else unpack_mask(np.array(mask, np.uint32), len(logits), device)
    token = int(sample_row(logits, law, len(ids), allowed))
    assert token == (-1 if case["token"] is None else case["token"])


def test_sampled_tokens_are_counted(device: torch.device) -> None:
    logits = torch.tensor([1.0, 2.0, 1.5], device=device)
    sampling = Sampling(temperature=0.0, presence_penalty=0.8)
    law = slot_law(SlotState([0], 1, sampling), 3, device)
    assert [int(sample_row(logits, law, 1 + i, None)) for i in range(3)] == [1, 2, 1]


@pytest.mark.parametrize("case", GOLDEN["logprobs"], ids=lambda case: str(GOLDEN["logprobs"].index(case)))
def test_golden_logprobs(case: dict[str, Any], device: torch.device) -> None:
    logits = row(case["row"], device)
    found = logprobs_of(logits[None], torch.tensor([case["token"]], device=device), case["top"])
    (got,) = found.read([case["token"]])
    want = float(case["logprob"])
    assert got.logprob == want or math.isclose(got.logprob, want, abs_tol=1e-4)
    assert [i for i, _ in got.top] == [i for i, _ in case["alternatives"]][: len(got.top)]

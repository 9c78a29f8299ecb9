"""The reference runner verifies drafts and samples from replaced logits as the contract says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from octavo.runners.base import Batch
from octavo.types import Sampling

STEPS = 12


@pytest.fixture
def driver(models: Any, tiny: Callable[..., Any], drive: Callable[..., Any]) -> Any:
    spec = models(72, 88, window=33)
    return drive(spec, tiny(spec).reference())


def sample(driver: Any, chunk: Any, **more: Any) -> tuple[Any, ...]:
    batch = Batch((chunk,))
    driver.runner.forward(batch)
    (found,) = driver.runner.sample(batch, **more).result().tokens
    return tuple(found)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(seed=3, frequency_penalty=0.5)])
@pytest.mark.parametrize("right", range(5))
def test_drafts(driver: Any, tokens: Callable[..., Any], sampling: Sampling, right: int) -> None:
    """Four guesses of which the first `right` come true: so many tokens, and one more; then it goes on."""
    prompt = tokens(40)
    driver.open(0, prompt, sampling)
    want = [sample(driver, driver.chunk(0, 0, prompt))[0].token_id]
    while len(want) < STEPS:
        want.append(sample(driver, driver.chunk(0, 39 + len(want), None))[0].token_id)
    driver.runner.close_slot(0)

    driver.open(0, prompt, sampling)
    (first,) = sample(driver, driver.chunk(0, 0, prompt))
    guesses = [*want[1 : 1 + right], *((t + 1) % 203 for t in want[1 + right : 5])]
    found = sample(driver, driver.chunk(0, 40, [first.token_id, *guesses], drafts=4))
    assert [s.token_id for s in found] == want[1 : 2 + right]
    (following,) = sample(driver, driver.chunk(0, 41 + right, None))
    assert following.token_id == want[2 + right]


def test_replaced_logits(driver: Any, tokens: Callable[..., Any]) -> None:
    """They are sampled from; logprobs stay the model's; not finite ones are the row's fault."""
    prompt = tokens(40)
    driver.open(0, prompt, Sampling(temperature=0.0, logprobs=0))
    chunk = driver.chunk(0, 0, prompt)
    driver.runner.forward(Batch((chunk,)))
    logits = driver.runner.logits(0)
    worst = int(logits.argmin())
    ((sampled,),) = driver.runner.sample(Batch((chunk,)), logits={0: -logits}).result().tokens
    assert sampled.token_id == worst
    assert sampled.logprob.logprob == pytest.approx(logits[worst] - np.log(np.exp(logits).sum()), abs=1e-4)
    broken = np.full_like(logits, np.nan)
    (failed,) = sample(driver, driver.chunk(0, 40, None), logits={0: broken})
    assert failed.token_id == -1

"""Nothing grows with the number of requests served: memory stays flat, and what ended leaves no trace."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable

import psutil
import pytest

from octavo.types import FinishReason


def anonymous_bytes() -> int:
    gc.collect()
    return psutil.Process().memory_full_info().uss


@pytest.mark.parametrize("count", [1500, pytest.param(20_000, marks=pytest.mark.soak)])
def test_memory_is_flat(toy, count):
    """Of the process, after the first third against the end: within 1 % and 2 MB (the heap's own grain)."""
    harness = toy.harness(slots=8, pages=(40,), context=128, chunk=64)
    source = random.Random(0)
    request = _requests(toy, source)
    served = 0
    sizes = []
    for third in range(3):
        while served < count * (third + 1) // 3:
            ids = [harness.submit(request()) for _ in range(16)]
            if source.random() < 0.3:
                harness.step()
                harness.engine.cancel(source.choice(ids))
            harness.drain()
            served += len(ids)
            assert all(harness.reason(i) in (FinishReason.LENGTH, FinishReason.CANCELLED) for i in ids)
            harness.events.clear()
            harness.order.clear()
            harness.runner.forwarded.clear()
        sizes.append(anonymous_bytes())
    first, _, last = sizes
    assert last < 1.01 * first + 2e6, sizes
    loop, scheduler = harness.engine._loop, harness.engine._scheduler
    assert not loop.live
    assert not scheduler._computing
    assert not scheduler._leaders
    pool = scheduler.paging.pool
    assert len(pool._keys[0]) == len(pool._pages[0]) <= 40


def _requests(toy, source: random.Random) -> Callable[[], object]:
    shared = [source.randrange(toy.vocab) for _ in range(64)]

    def make() -> object:
        own = [source.randrange(toy.vocab) for _ in range(source.randrange(1, 20))]
        prompt = [*(shared if source.random() < 0.5 else []), *own]
        return toy.request(
            prompt=prompt, new=source.randrange(1, 5), seed=source.randrange(2**32), temperature=0.0
        )

    return make

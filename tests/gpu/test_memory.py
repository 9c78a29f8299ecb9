"""Device memory as the driver counts it: back after every close, and too little of it is said with numbers."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.devices import Machine, Unusable, read_machine
from octavo.errors import NotEnoughMemoryError
from octavo.nvml import CardState

pytestmark = pytest.mark.gpu

PROMPT = [(7 * i) % 512 for i in range(200)]
PAGE_BYTES = 2 << 20
"""The card's own."""
GREEDY = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)


def free_bytes() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@contextmanager
def hog(left_bytes: int) -> Iterator[None]:
    """All of the card's memory taken but `left_bytes` and what does not fill a page of the card."""
    taken = torch.empty(
        (free_bytes() - left_bytes) // PAGE_BYTES * PAGE_BYTES, dtype=torch.uint8, device="cuda"
    )
    try:
        yield
    finally:
        del taken
        free_bytes()


def test_twenty_loads_leave_nothing_behind(folder: Path) -> None:
    def once() -> None:
        with LLM(folder, device="cuda", cache=False, max_sequences=4) as llm:
            llm.generate([PROMPT[: 50 + i] for i in range(4)], GREEDY)

    once()  # kernels and libraries stay loaded
    before = free_bytes()
    for _ in range(20):
        once()
    assert before - free_bytes() < 50 << 20


def test_a_plan_that_cannot_fit_says_need_free_and_remedy(folder: Path) -> None:
    with hog(150 << 20), pytest.raises(NotEnoughMemoryError) as failure:
        LLM(folder, device="cuda", cache=False, context=1024)
    check(failure.value, 150 << 20)
    assert "cuda:0 memory" in failure.value.message
    assert "smaller model" in failure.value.remedy  # no flag would do


def test_memory_that_goes_after_the_plan_is_said_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes it between the plan and the load: the plan sees a card that is free."""

    def roomy(*arguments: Any, **more: Any) -> Machine:
        machine = read_machine(*arguments, **more)
        assert not isinstance(machine.cuda, Unusable)
        return replace(machine, cuda=tuple(replace(gpu, available_bytes=40 << 30) for gpu in machine.cuda))

    monkeypatch.setattr("octavo.loading.read_machine", roomy)
    before = free_bytes()
    with hog(100 << 20), pytest.raises(NotEnoughMemoryError) as failure:
        LLM(folder, device="cuda", cache=False, context=1024)
    check(failure.value, 100 << 20)
    assert "loading needs" in failure.value.message
    assert "--" in failure.value.remedy
    assert before - free_bytes() < 50 << 20  # while the error is held


def test_memory_that_goes_while_it_runs_is_said_too(folder: Path) -> None:
    with (
        LLM(folder, device="cuda", cache=False, context=1024) as llm,
        hog(2 << 20),
        pytest.raises(NotEnoughMemoryError, match="something else took it"),
    ):
        llm.score((PROMPT * 5)[:1000])


def check(error: NotEnoughMemoryError, left_bytes: int) -> None:
    assert error.needed_bytes > error.available_bytes
    assert error.available_bytes == pytest.approx(left_bytes, rel=0.3)
    assert re.search(r"\d MiB", error.message)


def test_the_card_is_told(folder: Path) -> None:
    pytest.importorskip("pynvml")
    with LLM(folder, device="cuda", cache=False) as llm:
        first = llm.info()["card"]
        llm.generate(PROMPT, GREEDY)
        card = llm.explain()["device"]["card"]
    assert set(card) == set(CardState(0, 0, (), None).to_json())
    total = torch.cuda.get_device_properties(0).total_memory
    assert card["total_bytes"] == pytest.approx(total, rel=0.05)
    assert card["free_bytes"] == pytest.approx(torch.cuda.mem_get_info()[0], abs=1 << 30)
    assert card["energy_joules"] >= first["energy_joules"] > 0

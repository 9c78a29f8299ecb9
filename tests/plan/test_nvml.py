"""What the management library is asked, against a stand-in for its module; and where its answers are said."""

from __future__ import annotations

import os
import re
from types import SimpleNamespace
from typing import Any

import pytest

from octavo.cli.facts import card_memory
from octavo.devices import open_device_card
from octavo.load_plan import Pool
from octavo.nvml import CardProcess, CardReader, CardState, open_card
from octavo.plan_words import refusal, tight_warning
from octavo.server.metrics import Metrics

GIB = 1 << 30
MEMORY = SimpleNamespace(total=80 * GIB, free=30 * GIB, used=50 * GIB)


class FakeNvml:
    """The module pynvml; `refused`: the calls that raise."""

    class NVMLError(Exception): ...

    def __init__(self, *refused: str) -> None:
        self.refused = refused
        self.opened = 0
        self.compute = [
            SimpleNamespace(pid=7, usedGpuMemory=2 * GIB),
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=30 * GIB),
            SimpleNamespace(pid=8, usedGpuMemory=18 * GIB),
        ]

    def __getattr__(self, name: str) -> Any:
        if name in self.refused:
            raise self.NVMLError(name)
        return {
            "nvmlInit": lambda: self._open(1),
            "nvmlShutdown": lambda: self._open(-1),
            "nvmlDeviceGetHandleByPciBusId": lambda bus: f"card {bus}",
            "nvmlDeviceGetMemoryInfo": lambda handle: MEMORY,
            "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 12_345,
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: self.compute,
            "nvmlDeviceGetGraphicsRunningProcesses": lambda handle: [
                SimpleNamespace(pid=9, usedGpuMemory=None)
            ],
        }[name]

    def _open(self, count: int) -> None:
        self.opened += count


def read(library: FakeNvml) -> CardState | None:
    card = open_card("0000:65:00.0", lambda: library)
    assert card is not None
    state = card.read()
    card.close()
    card.close()
    assert library.opened == 0
    assert card.read() is None
    return state


OTHERS = (CardProcess(8, 18 * GIB), CardProcess(7, 2 * GIB), CardProcess(9, None))


def test_the_others_are_everyone_but_this_process_largest_first() -> None:
    state = read(FakeNvml())
    assert state == CardState(80 * GIB, 30 * GIB, OTHERS, 12.345)
    assert state.to_json()["others_bytes"] == 20 * GIB
    assert state.to_json()["others"][2] == {"pid": 9, "used_bytes": None}


def test_what_a_driver_refuses_is_missing_and_the_rest_is_not() -> None:
    no_energy = read(FakeNvml("nvmlDeviceGetTotalEnergyConsumption"))
    assert no_energy == CardState(80 * GIB, 30 * GIB, OTHERS, None)
    no_list = read(FakeNvml("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"))
    assert no_list == CardState(80 * GIB, 30 * GIB, (), 12.345)
    assert read(FakeNvml("nvmlDeviceGetMemoryInfo")) is None


@pytest.mark.parametrize("refused", ["nvmlInit", "nvmlDeviceGetHandleByPciBusId"])
def test_where_nobody_can_be_asked_nothing_stays_open(refused: str) -> None:
    library = FakeNvml(refused)
    assert open_card("0000:65:00.0", lambda: library) is None
    assert library.opened == 0


def test_without_the_package_there_is_nothing_to_ask() -> None:
    def load() -> Any:
        raise ModuleNotFoundError("No module named 'pynvml'")

    assert open_card("0000:65:00.0", load) is None


def test_a_device_without_a_driver_has_no_card() -> None:
    def load(name: str) -> Any:
        raise OSError(name)

    assert open_device_card("cpu", load) is None
    assert open_device_card("cuda:1", load) is None


def test_the_driver_names_the_card_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any) -> int:
                if name == "cuDeviceGet":
                    arguments[0]._obj.value = 10 + arguments[1]
                if name == "cuDeviceGetPCIBusId":
                    arguments[0].value = b"0000:%d:00.0" % arguments[2]
                return 0

            return call

    asked: list[str] = []
    monkeypatch.setattr("octavo.devices.open_card", asked.append)
    open_device_card("cuda:1", lambda name: Driver())
    assert asked == ["0000:11:00.0"]


def test_the_plan_says_who_else_is_on_the_card() -> None:
    pool = Pool("cuda:0", {"weights": 29 * GIB}, 0, 30 * GIB, 28 * GIB, (*OTHERS, CardProcess(11, 1)))
    said = "other processes hold memory too (pid 8 18.0 GiB, pid 7 2.0 GiB, pid 9, 1 more)"
    assert said in tight_warning(pool)
    assert said in refusal("it", [pool], []).message
    alone = Pool("cuda:0", {"weights": 29 * GIB}, 0, 30 * GIB, 28 * GIB)
    assert "other processes" not in tight_warning(alone) + refusal("it", [alone], []).message


def test_the_facts_line_says_what_is_free() -> None:
    facts = CardState(80 * GIB, 30 * GIB, OTHERS, None).to_json()
    assert card_memory(facts) == "30.0 GiB of 80.0 GiB free on the card, 20.0 GiB other processes'"
    assert card_memory(facts | {"others_bytes": 0}) == "30.0 GiB of 80.0 GiB free on the card"


def test_metrics_have_energy_and_memory_of_the_card() -> None:
    page = Metrics().page({"m": {"card": CardState(80 * GIB, 30 * GIB, OTHERS, 12.345).to_json()}}).decode()
    assert 'octavo_card_energy_joules{model="m"} 12.345' in page
    (others,) = re.findall(r'^octavo_card_others_bytes\{model="m"\} (.+)$', page, re.MULTILINE)
    assert float(others) == 20 * GIB
    assert "octavo_card" not in Metrics().page({"m": {"card": None}}).decode()


def test_a_reader_is_asked_again_and_again() -> None:
    library = FakeNvml()
    card = CardReader(library, "card")
    library.compute.clear()
    state = card.read()
    assert state is not None
    assert state.others == (CardProcess(9, None),)

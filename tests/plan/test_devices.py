"""Facts about a machine from made-up /proc, /sys and CUDA drivers, and the device each setting means on it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo import devices
from octavo.devices import (
    DeviceChoice,
    Gpu,
    Machine,
    Unusable,
    choose_device,
    parse_device,
    read_cuda_driver,
    read_machine,
)
from octavo.errors import DeviceError, InvalidParameterError

MIB = 1 << 20
NO_DRIVER = Unusable("no NVIDIA driver is installed", "Install it.")
NO_MPS = Unusable("this is not an Apple silicon Mac", "Use --device cpu.")
H100 = Gpu("H100", (9, 0), 80 << 30, 79 << 30)


def machine(cuda: tuple[Gpu, ...] | Unusable = NO_DRIVER, mps: Unusable | None = NO_MPS) -> Machine:
    return Machine(total_bytes=16 << 30, available_bytes=12 << 30, cores=4, cpus=8, cuda=cuda, mps=mps)


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


# --- which device ----------------------------------------------------------------------------------


def test_auto_prefers_cuda_then_mps_then_cpu() -> None:
    assert choose_device("auto", machine((H100,), None)) == DeviceChoice("cuda:0", "auto found H100")
    assert choose_device("auto", machine(mps=None)).device == "mps"
    choice = choose_device("auto", machine())
    assert choice.device == "cpu"
    assert "no NVIDIA driver" in choice.reason or sys.platform == "darwin"


def test_what_was_asked_for_is_taken() -> None:
    both = machine((H100, H100), None)
    assert choose_device("cpu", both).device == "cpu"
    assert choose_device("mps", both).device == "mps"
    assert choose_device("cuda", both).device == "cuda:0"
    assert choose_device("cuda:1", both).device == "cuda:1"


@pytest.mark.parametrize(
    ("setting", "on", "cause"),
    [
        ("cuda", machine(), "no NVIDIA driver"),
        ("cuda:1", machine(Unusable("this torch build is CPU only", "x")), "CPU only"),
        ("cuda:2", machine((H100, H100)), "cuda:0 to cuda:1"),
        ("cuda:1", machine((H100,)), "only cuda:0"),
        ("mps", machine(), "Apple silicon"),
    ],
)
def test_a_device_that_is_not_there_names_the_cause(setting: str, on: Machine, cause: str) -> None:
    with pytest.raises(DeviceError, match=cause) as caught:
        choose_device(setting, on)
    assert setting in caught.value.message
    assert caught.value.exit_code == 5


@hypothesis.settings(deadline=None)
@given(st.text() | st.integers() | st.none() | st.floats() | st.lists(st.text()))
def test_any_other_device_is_refused(setting: object) -> None:
    with contextlib.suppress(InvalidParameterError):
        kind, index = parse_device(setting)
        assert setting == kind or int(str(setting).removeprefix("cuda:")) == index


@pytest.mark.parametrize(
    "setting",
    ["gpu", "cuda:", "cuda:-1", "cuda:1000", "cuda:٣", "CPU", "cpu\n", pytest.param(10**5000, id="huge")],
)
def test_near_misses_are_refused(setting: object) -> None:
    with pytest.raises(InvalidParameterError, match="device is"):
        parse_device(setting)


def test_gpu_of_a_device() -> None:
    assert machine((H100,)).gpu("cuda:0") is H100
    assert machine((H100,)).gpu("cpu") is None
    assert not Gpu("T4", (7, 5), 1, 1).bfloat16


# --- memory and cores ------------------------------------------------------------------------------


@pytest.fixture
def one_core_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process may run on logical CPUs 0 to 3."""
    monkeypatch.setattr(devices, "_affinity", lambda: frozenset(range(4)))


def test_without_limits_the_machine_is_as_psutil_says(tmp_path: Path) -> None:
    seen = read_machine(root=tmp_path)
    assert seen.total_bytes == psutil.virtual_memory().total
    assert 0 < seen.available_bytes <= seen.total_bytes
    assert isinstance(seen.cuda, Unusable)


def test_cgroup_v2_limits_count_and_so_do_those_above(tmp_path: Path) -> None:
    groups = "sys/fs/cgroup/"
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job:1/step",
            groups + "memory.max": "max",
            groups + "job:1/memory.max": str(100 * MIB),
            groups + "job:1/memory.current": str(70 * MIB),
            groups + "job:1/memory.stat": f"anon 5\ninactive_file {10 * MIB}\nactive_file 3",
            groups + "job:1/step/memory.max": str(90 * MIB),
            groups + "job:1/step/memory.current": str(20 * MIB),
        },
    )
    seen = read_machine(root=root)
    assert seen.total_bytes == 90 * MIB
    assert seen.available_bytes == 40 * MIB  # the group above: 100 - (70 - 10 that can be reclaimed)


@pytest.mark.parametrize("path", ["/docker/abc", "/../host/name", "/"])
def test_cgroup_v1_limits_count_from_inside_a_container(tmp_path: Path, path: str) -> None:
    groups = "sys/fs/cgroup/memory/"
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": f"5:cpuset:/\n4:memory:{path}\n0::/",
            groups + "memory.limit_in_bytes": str(64 * MIB),
            groups + "memory.usage_in_bytes": str(30 * MIB),
            groups + "memory.stat": f"total_inactive_file {8 * MIB}",
        },
    )
    seen = read_machine(root=root)
    assert (seen.total_bytes, seen.available_bytes) == (64 * MIB, 42 * MIB)


def test_cgroup_v1_without_a_limit_says_a_huge_number(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
        },
    )
    assert read_machine(root=root).total_bytes == psutil.virtual_memory().total


@pytest.mark.usefixtures("one_core_each")
def test_threads_of_one_core_count_once(tmp_path: Path) -> None:
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    siblings = {topology.format(cpu): f"{cpu % 2},{cpu % 2 + 2}" for cpu in range(4)}
    assert read_machine(root=write(tmp_path, siblings)).cores == 2
    assert read_machine(root=tmp_path / "nothing").cores == 4


@pytest.mark.usefixtures("one_core_each")
@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 2),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 4),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            4,
        ),
    ],
)
def test_cpu_quota_counts(tmp_path: Path, files: Mapping[str, str], cores: int) -> None:
    assert read_machine(root=write(tmp_path, files)).cores == cores


# --- CUDA ------------------------------------------------------------------------------------------


class FakeDriver:
    """The CUDA driver API's library, as ctypes would give it, for two cards."""

    def __init__(
        self, *, fails: Mapping[str, int] | None = None, version: int = 13000, count: int = 2
    ) -> None:
        self.fails = dict(fails or {})
        self.version = version
        self.count = count
        self.contexts: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.fails.get(name) or self.answer(name, *arguments)

    def answer(self, name: str, *arguments: Any) -> int:
        def give(value: Any) -> None:
            arguments[0]._obj.value = value

        match name:
            case "cuDriverGetVersion":
                give(self.version)
            case "cuDeviceGetCount":
                give(self.count)
            case "cuDeviceGet":
                give(arguments[1])
            case "cuDeviceGetName":
                arguments[0].value = b"Card %d" % arguments[2]
            case "cuDeviceTotalMem_v2":
                give((24 + arguments[1]) << 30)
            case "cuDeviceGetAttribute":
                give({75: 8, 76: 6}[arguments[1]])
            case "cuDevicePrimaryCtxRetain":
                self.contexts.append(arguments[1])
            case "cuDevicePrimaryCtxRelease_v2":
                self.contexts.remove(arguments[0])
            case "cuMemGetInfo_v2":
                give((20 + self.contexts[-1]) << 30)
            case "cuGetErrorString":
                arguments[1]._obj.value = b"the card fell off the bus"
        return 0


def ask(
    driver: FakeDriver | None, index: int = 0, visible: str | None = None, torch: str | None = "13.0"
) -> tuple[Gpu, ...] | Unusable:
    def load(name: str) -> FakeDriver:
        if driver is None:
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return read_cuda_driver(index, environment, load=load, torch_cuda=lambda: torch)


def test_the_driver_describes_every_card_and_measures_one() -> None:
    driver = FakeDriver()
    assert ask(driver, index=1) == (
        Gpu("Card 0", (8, 6), 24 << 30, None),
        Gpu("Card 1", (8, 6), 25 << 30, 21 << 30),
    )
    assert driver.contexts == []


@pytest.mark.parametrize(
    ("cause", "found"),
    [
        ("no NVIDIA driver", ask(None)),
        ("no NVIDIA driver", ask(None, visible="")),
        ("CUDA_VISIBLE_DEVICES='' hides", ask(FakeDriver(), visible="")),
        ("CUDA_VISIBLE_DEVICES='-1' hides", ask(FakeDriver(), visible="-1")),
        ("CUDA_VISIBLE_DEVICES='7' hides", ask(FakeDriver(count=0), visible="7")),
        ("CUDA_VISIBLE_DEVICES='none' hides", ask(FakeDriver(fails={"cuInit": 100}), visible="none")),
        ("CPU only", ask(FakeDriver(), torch=None)),
        ("offers CUDA 12.4, this torch build needs 13.0", ask(FakeDriver(version=12040))),
        ("no CUDA-capable device", ask(FakeDriver(count=0))),
        ("fell off the bus.*999", ask(FakeDriver(fails={"cuInit": 999}))),
        ("fell off the bus.*2", ask(FakeDriver(fails={"cuMemGetInfo_v2": 2}))),
    ],
)
def test_each_cause_is_named(cause: str, found: object) -> None:
    assert isinstance(found, Unusable)
    with pytest.raises(DeviceError, match=cause):
        choose_device("cuda", machine(found))


def test_an_older_minor_version_of_the_driver_will_do() -> None:
    assert not isinstance(ask(FakeDriver(version=13000), torch="13.2"), Unusable)


def test_only_settings_that_could_mean_a_gpu_ask_for_one(tmp_path: Path) -> None:
    asked: list[int] = []

    def read_cuda(index: int, environment: Mapping[str, str]) -> tuple[Gpu, ...]:
        asked.append(index)
        return (H100,) * 3

    for setting in ("cpu", "mps", "auto", "cuda", "cuda:2"):
        read_machine(setting, root=tmp_path, read_cuda=read_cuda)
    assert asked == [0, 0, 2]


def test_the_cuda_version_of_torch_is_read_without_importing_it() -> None:
    import torch

    assert devices._torch_cuda_version() == torch.version.cuda
    code = "import sys; from octavo.devices import read_machine; read_machine('auto'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

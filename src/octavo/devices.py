"""Facts about this machine (memory, cores, GPUs), and which device a setting means on it.

Control groups and CPU affinity are honoured, so a container sees its own limits. CUDA is asked through the
driver's own library: torch is never imported here. Who else is on a card only `octavo.nvml` knows. What to put on a
device is `octavo.plan`'s decision.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from octavo.errors import DeviceError, InvalidParameterError
from octavo.nvml import CardProcess, CardReader, open_card

DeviceKind = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device, numbered as CUDA_VISIBLE_DEVICES leaves them."""

    name: str
    compute_capability: tuple[int, int]
    total_bytes: int
    available_bytes: int | None = None
    """Free beside a CUDA context; None for a device `read_machine` was not asked about."""
    others: tuple[CardProcess, ...] = ()
    """Processes that hold memory on it, largest first; none where nobody says."""

    @property
    def bfloat16(self) -> bool:
        """Ampere and later compute it in hardware."""
        return self.compute_capability >= (8, 0)


@dataclass(frozen=True, slots=True)
class Unusable:
    """Why a kind of device cannot be used, and what the user can do about it."""

    why: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan needs to know. A kind of device that was not asked about is `Unusable`."""

    total_bytes: int
    """RAM, or the control group's limit where that is less."""
    available_bytes: int
    """What can be allocated now without swapping or being killed."""
    cores: int
    """Physical cores this process may use: affinity and CPU quota count."""
    cpus: int
    """Logical CPUs it may run on, whatever their quota."""
    cuda: tuple[Gpu, ...] | Unusable
    mps: Unusable | None
    """None: usable."""

    def gpu(self, device: str) -> Gpu | None:
        """The CUDA device called cuda:N; None for cpu and mps."""
        if not device.startswith("cuda:"):
            return None
        assert not isinstance(self.cuda, Unusable)
        return self.cuda[int(device.removeprefix("cuda:"))]


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    device: str
    """cpu, cuda:N or mps."""
    reason: str


_NOT_ASKED = Unusable("it was not asked for", "Use --device auto.")


def parse_device(setting: object) -> tuple[DeviceKind, int]:
    """(kind, index); the index is 0 where none was named. Raises InvalidParameterError."""
    if isinstance(setting, str):
        if setting in ("auto", "cpu", "cuda", "mps"):
            return setting, 0  # type: ignore[return-value]  # mypy does not narrow str to Literal by `in`
        if numbered := re.fullmatch(r"cuda:([0-9]{1,3})", setting):
            return "cuda", int(numbered[1])
    said = f"{setting!r:.60}" if isinstance(setting, str) else f"of type {type(setting).__name__}"
    raise InvalidParameterError(
        f"device is {said}, which is no device Octavo knows",
        remedy="Use --device auto, cpu, cuda (an NVIDIA GPU), cuda:N (N from 0) or mps.",
        parameter="device",
    )


def choose_device(setting: str, machine: Machine) -> DeviceChoice:
    """The device `setting` means on `machine`, which was read for the same setting.

    auto takes cuda, else mps, else the CPU; the reason says why not the better ones. Raises DeviceError where
    the device asked for cannot be used, InvalidParameterError where there is no such kind.
    """
    kind, index = parse_device(setting)
    cuda, mps = machine.cuda, machine.mps
    if kind == "cpu":
        return DeviceChoice("cpu", "as asked")
    if kind == "auto":
        if not isinstance(cuda, Unusable):
            return DeviceChoice("cuda:0", f"auto found {cuda[0].name}")
        if mps is None:
            return DeviceChoice("mps", "auto found Apple's GPU")
        why = cuda.why if sys.platform != "darwin" else mps.why
        return DeviceChoice("cpu", f"auto found no usable GPU: {why}")
    if kind == "mps":
        if mps is not None:
            raise DeviceError(f"device mps cannot be used: {mps.why}", remedy=mps.remedy)
        return DeviceChoice("mps", "as asked")
    if isinstance(cuda, Unusable):
        raise DeviceError(f"device {setting} cannot be used: {cuda.why}", remedy=cuda.remedy)
    if index >= len(cuda):
        have = "only cuda:0" if len(cuda) == 1 else f"cuda:0 to cuda:{len(cuda) - 1}"
        raise DeviceError(
            f"device {setting} does not exist: this machine shows {have}",
            remedy="Use a device that exists; CUDA_VISIBLE_DEVICES decides which are shown.",
        )
    return DeviceChoice(f"cuda:{index}", f"as asked, {cuda[index].name}")


def read_machine(
    setting: str = "cpu",
    *,
    root: Path = Path("/"),
    environment: Mapping[str, str] = os.environ,
    read_cuda: Callable[[int, Mapping[str, str]], tuple[Gpu, ...] | Unusable] | None = None,
) -> Machine:
    """Look at this machine; GPUs only where the device `setting` could mean one.

    `root` holds /proc and /sys, and `read_cuda` (device index, environment) stands in for the driver in tests.
    Raises InvalidParameterError for an unknown setting.
    """
    kind, index = parse_device(setting)
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    for limit, used in _memory_limits(root):
        total, available = min(total, limit), min(available, max(0, limit - used))
    cuda: tuple[Gpu, ...] | Unusable = _NOT_ASKED
    if kind in ("cuda", "auto"):
        cuda = (read_cuda or read_cuda_driver)(index, environment)
    return Machine(
        total_bytes=total,
        available_bytes=available,
        cores=_usable_cores(root),
        cpus=len(_affinity() or ()) or os.cpu_count() or 1,
        cuda=cuda,
        mps=_mps_problem() if kind in ("mps", "auto") else _NOT_ASKED,
    )


# --- control groups and cores ----------------------------------------------------------------------


def _control_groups(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """(version, folder) of this process's control group and every group above it.

    /proc/self/cgroup has lines `id:controllers:path`, with no controllers for version 2 (cgroups(7)). Inside a
    container the path may be the host's, and only the mount's top folder exists.
    """
    top = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            version, mount = 2, top
        elif controller in controllers.split(","):
            version, mount = 1, top / controllers if (top / controllers).is_dir() else top / controller
        else:
            continue
        folder = mount / path.strip("/")
        for group in (folder, *folder.parents):
            if group.is_dir():
                yield version, group
            if group == mount:
                break


_MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""Version of control groups -> limit, usage, and the line of memory.stat that can be reclaimed."""


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that cannot be reclaimed) of each control group that has a limit."""
    for version, group in _control_groups(root, "memory"):
        limit_file, usage_file, cached_line = _MEMORY_FILES[version]
        limit, used = _number(group / limit_file), _number(group / usage_file) or 0
        if limit is not None:
            cached = re.search(rf"^{cached_line} ([0-9]+)$", _text(group / "memory.stat"), re.MULTILINE)
            yield limit, max(0, used - int(cached[1] if cached else 0))


def _usable_cores(root: Path) -> int:
    affinity = _affinity()
    if affinity is None:
        cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    else:
        # Threads of one core share a siblings list; without the file (some sandboxes) each stands for itself.
        topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
        cores = len({_text(root / topology.format(cpu)) or str(cpu) for cpu in affinity})
    for version, group in _control_groups(root, "cpu"):
        if version == 2:
            quota, _, period = _text(group / "cpu.max").partition(" ")
        else:
            quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            # Rounded down: threads beyond the quota are stopped together at the next barrier.
            cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def _affinity() -> frozenset[int] | None:
    """Logical CPUs this process may run on; None where the platform cannot say."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


# --- CUDA and MPS ------------------------------------------------------------------------------------

_USE_CPU = "or use --device cpu."
_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


class _DriverError(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class _Driver:
    """The few calls of the CUDA driver API that describe devices (docs.nvidia.com/cuda/cuda-driver-api)."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise _DriverError(code, (text.value or b"unknown").decode("ascii", "replace"))

    def integer(self, name: str, *arguments: Any) -> int:
        """The value of a call whose first argument is where an int goes."""
        value = ctypes.c_int()
        self.call(name, ctypes.byref(value), *arguments)
        return value.value

    def gpu(self, index: int, measure: bool) -> Gpu:
        device = self.integer("cuDeviceGet", index)
        name, total = ctypes.create_string_buffer(256), ctypes.c_size_t()
        self.call("cuDeviceGetName", name, len(name), device)
        self.call("cuDeviceTotalMem_v2", ctypes.byref(total), device)
        return Gpu(
            name=name.value.decode("utf-8", "replace"),
            compute_capability=(
                self.integer("cuDeviceGetAttribute", _CAPABILITY_MAJOR, device),
                self.integer("cuDeviceGetAttribute", _CAPABILITY_MINOR, device),
            ),
            total_bytes=total.value,
            available_bytes=self._free_bytes(device) if measure else None,
            others=self._others(index) if measure else (),
        )

    def pci_bus_id(self, index: int) -> str:
        """As 0000:65:00.0: the one name of a card that the management library has too."""
        found = ctypes.create_string_buffer(32)
        self.call("cuDeviceGetPCIBusId", found, len(found), self.integer("cuDeviceGet", index))
        return found.value.decode("ascii", "replace")

    def _others(self, index: int) -> tuple[CardProcess, ...]:
        try:
            card = open_card(self.pci_bus_id(index))
        except _DriverError:
            return ()
        if card is None:
            return ()
        state = card.read()
        card.close()
        return () if state is None else state.others

    def _free_bytes(self, device: int) -> int:
        context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        try:
            self.call("cuCtxPushCurrent_v2", context)
            self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
            self.call("cuCtxPopCurrent_v2", ctypes.byref(context))
        finally:
            self.call("cuDevicePrimaryCtxRelease_v2", device)
        return free.value


def read_cuda_driver(
    index: int,
    environment: Mapping[str, str],
    *,
    load: Callable[[str], Any] = ctypes.CDLL,
    torch_cuda: Callable[[], str | None] | None = None,
) -> tuple[Gpu, ...] | Unusable:
    """The CUDA devices, the free memory of number `index` among them, or why there are none.

    `load` opens the driver's library and `torch_cuda` says the CUDA version torch was built for; tests replace
    them.
    """
    try:
        driver = _Driver(load(_DRIVER))
    except OSError:
        return Unusable("no NVIDIA driver is installed", f"Install the NVIDIA driver, {_USE_CPU}")
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and re.match(r"\s*(-|,|$)", visible):
        return _hidden(visible)
    built_for = (torch_cuda or _torch_cuda_version)()
    if built_for is None:
        return Unusable(
            "this torch build is CPU only",
            f"Install a CUDA build of torch (pytorch.org/get-started), {_USE_CPU}",
        )
    try:
        driver.call("cuInit", 0)
        offers = driver.integer("cuDriverGetVersion")
        # Within a major version the driver may be older than the toolkit (CUDA minor version compatibility).
        if offers // 1000 < int(built_for.partition(".")[0]):
            return Unusable(
                f"the NVIDIA driver offers CUDA {offers // 1000}.{offers % 1000 // 10}, "
                f"this torch build needs {built_for}",
                f"Update the NVIDIA driver, or install torch for an older CUDA, {_USE_CPU}",
            )
        count = driver.integer("cuDeviceGetCount")
        if count == 0:
            raise _DriverError(_NO_DEVICE, "no CUDA-capable device is detected")
        return tuple(driver.gpu(i, measure=i == index) for i in range(count))
    except _DriverError as error:
        if error.code == _NO_DEVICE and visible is not None:
            return _hidden(visible)
        return Unusable(
            f"the NVIDIA driver reports: {error} (CUDA error {error.code})",
            f"See whether nvidia-smi works, {_USE_CPU}",
        )


def open_device_card(device: str, load: Callable[[str], Any] = ctypes.CDLL) -> CardReader | None:
    """The card behind cuda:N for `octavo.nvml`; None for other devices, and where there is nobody to ask."""
    kind, index = parse_device(device)
    if kind != "cuda":
        return None
    try:
        driver = _Driver(load(_DRIVER))
        driver.call("cuInit", 0)
        return open_card(driver.pci_bus_id(index))
    except (OSError, _DriverError):
        return None


def _hidden(visible: str) -> Unusable:
    return Unusable(
        f"CUDA_VISIBLE_DEVICES={visible!r:.60} hides all devices",
        f"Change or unset that variable, {_USE_CPU}",
    )


def _torch_cuda_version() -> str | None:
    """The CUDA version torch was built for, read from its version.py: importing torch takes seconds."""
    found = importlib.util.find_spec("torch")
    folders = found.submodule_search_locations if found else None
    text = _text(Path(folders[0]) / "version.py") if folders else ""
    version = re.search(r"^cuda\b[^=\n]*=\s*['\"]([0-9.]+)['\"]", text, re.MULTILINE)
    return version[1] if version else None


def _mps_problem() -> Unusable | None:
    if sys.platform != "darwin" or platform.machine() != "arm64":
        return Unusable("this is not an Apple silicon Mac", "Use --device cpu.")
    release = platform.mac_ver()[0]
    if int(release.partition(".")[0] or 0) < 14:
        return Unusable(
            f"torch needs macOS 14 for it, this is {release}", "Update macOS, or use --device cpu."
        )
    return None

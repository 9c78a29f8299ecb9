"""What a start on a CUDA device needs beside the weights, begun before anything else is known: three threads.

Importing torch takes seconds, most of them in the dynamic linker, which Python's own import keeps everybody waiting
for. So the libraries are opened through ctypes, which lets the others run; beside it the driver makes the device's
context, and Triton is imported and hashed. What fails here fails again, and is said, where it is needed.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

_LIBRARIES = ("libtorch_global_deps.so", "libtorch_cuda.so", "libtorch_python.so")
"""In the order in which torch opens them itself."""


def begin_preloading(device: str) -> threading.Thread:
    """Returns the thread that ends when the runner is imported and the device has its context."""
    beside = [_begin(_make_context, device), _begin(_import_compiler)]
    return _begin(_import_runner, device, beside)


def _begin(work: Callable[..., None], *arguments: object) -> threading.Thread:
    def run() -> None:
        with suppress(Exception):
            work(*arguments)

    # No daemon: the interpreter must not go down under a library that is just being loaded.
    thread = threading.Thread(target=run, name=f"octavo-preload{work.__name__}")
    thread.start()
    return thread


def _import_runner(device: str, beside: list[threading.Thread]) -> None:
    with suppress(OSError):  # of a platform where they are called otherwise
        _open_libraries()
    import torch

    for thread in beside:
        thread.join()
    torch.zeros(1, device=device)
    import octavo.runners.cuda.runner  # noqa: F401

    _begin(_hash_kernels)


def _open_libraries() -> None:
    found = find_spec("torch")
    if found is None or found.origin is None or "torch" in sys.modules:
        return
    for name in _LIBRARIES:
        mode = ctypes.RTLD_GLOBAL if name == _LIBRARIES[0] else ctypes.RTLD_LOCAL
        ctypes.CDLL(str(Path(found.origin).parent / "lib" / name), mode)


def _make_context(device: str) -> None:
    """The primary context, which torch takes over. It stays: torch would keep it as well."""
    driver = ctypes.CDLL("libcuda.so.1")
    number, context = ctypes.c_int(), ctypes.c_void_p()
    driver.cuInit(0)
    driver.cuDeviceGet(ctypes.byref(number), int(device.partition(":")[2] or 0))
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), number)


def _import_compiler() -> None:
    """Triton, with what it imports at its first kernel, and the hash of all of it that kernels are found by."""
    import triton.experimental.gluon  # noqa: F401
    from triton.runtime.cache import triton_key

    triton_key()


def _hash_kernels() -> None:
    """What Triton reads of each kernel's source to find it compiled, while weights are on their way."""
    from triton.runtime.jit import JITFunction

    for name, module in list(sys.modules.items()):
        if name.startswith("octavo.runners.cuda."):
            for value in list(vars(module).values()):
                if isinstance(value, JITFunction):
                    _ = value.cache_key

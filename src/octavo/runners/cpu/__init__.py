"""The native CPU runner: the C++ kernels of csrc/, called through ctypes. Imports no torch, and no library yet."""

from octavo.runners.cpu.kind import CpuRunnerKind

__all__ = ["CpuRunnerKind"]

"""`import octavo` and `octavo --help` are quick and import nothing heavy.

Times are of the processor, the best of several: what else the machine does is not counted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import octavo

HEAVY = {"torch", "numpy", "transformers", "tokenizers", "huggingface_hub", "pydantic", "jinja2"}


def python(code: str) -> str:
    # A variable of ours is read with pydantic-settings, which is not what is measured here.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OCTAVO_")}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=environment
    ).stdout


def heavy_after(code: str) -> set[str]:
    return HEAVY & set(python(f"{code}\nimport sys; print(*sys.modules, sep='\\n')").splitlines())


def test_import_takes_less_than_a_tenth_of_a_second():
    code = "import time; started = time.process_time(); import octavo; print(time.process_time() - started)"
    assert min(float(python(code)) for _ in range(5)) < 0.1


def test_import_is_light():
    assert heavy_after("import octavo; octavo.Settings, octavo.SamplingParams, octavo.OctavoError") == set()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_takes_less_than_three_tenths_of_a_second(arguments):
    script = str(Path(sys.executable).with_name("octavo"))

    def once() -> float:
        process = subprocess.Popen([script, *arguments], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return used.ru_utime + used.ru_stime

    assert min(once() for _ in range(8)) < 0.3


_REFUSED = [
    "generate",
    "hi",
    "--raw",
    "--system",
    "x",
    "--seed",
    "9",
    "--temperature",
    "0.5",
    "--quant",
    "int8",
]


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], _REFUSED])
def test_help_and_usage_errors_are_light(arguments):
    assert heavy_after(f"from octavo.cli.main import main; main({arguments!r})") == set()


def test_the_check_can_fail():
    assert heavy_after("import numpy") == {"numpy"}


def test_every_public_name_is_there():
    for name in octavo.__all__:
        assert getattr(octavo, name) is not None
    assert set(octavo.__all__) <= set(dir(octavo))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        octavo.nothing  # noqa: B018


def test_every_error_class_is_public():
    from octavo import errors

    classes = {
        name for name, value in vars(errors).items() if isinstance(value, type) and name.endswith("Error")
    }
    assert classes == {name for name in octavo.__all__ if name.endswith("Error")}


def test_the_command_is_also_a_module():
    environment = os.environ | {"PYTHONWARNINGS": "error"}
    for command in ([sys.executable, "-m", "octavo"], [Path(sys.executable).with_name("octavo")]):
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, check=True, env=environment, timeout=60
        )
        assert (done.stdout, done.stderr) == (f"octavo {octavo.__version__}\n", "")

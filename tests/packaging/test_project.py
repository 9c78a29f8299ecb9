"""pyproject, constraints, wheel and Makefile agree with each other and with the README's promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import octavo

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("==") for line in lines if not line.startswith("#"))
    return {canonical(name): version for name, _, version in pairs}


def test_every_dependency_has_a_tested_version_in_its_range():
    versions = constraints()
    for requirement in map(
        Requirement, chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    ):
        if requirement.name == PROJECT["name"]:
            continue
        assert requirement.specifier.contains(versions[canonical(requirement.name)]), requirement


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    quick = os.environ | {"HATCH_BUILD_NO_HOOKS": "true"}  # without compiling the kernels
    subprocess.run(command, cwd=ROOT, env=quick, check=True, capture_output=True, timeout=120)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_has_the_package_and_nothing_else(wheel):
    names = set(wheel.namelist())
    sources = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src").rglob("*")
        if path.is_file()
        and path.suffix != ".so"
        and not any(part.startswith((".", "__pycache__")) for part in path.parts)
    }
    assert sources <= names
    assert "octavo/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"octavo", f"octavo-{octavo.__version__}.dist-info"}


def test_the_wheel_carries_license_command_and_version(wheel):
    info = f"octavo-{octavo.__version__}.dist-info"
    assert b"Apache License" in wheel.read(f"{info}/licenses/LICENSE")
    assert b"octavo = octavo.__main__:run" in wheel.read(f"{info}/entry_points.txt")
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"Version: {octavo.__version__}" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata


# --- Makefile ----------------------------------------------------------------------------------------------


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A .venv in which everything is done, whose octavo prints its arguments."""
    scripts = tmp_path / "venv" / "bin"
    scripts.mkdir(parents=True)
    for name, body in {
        "octavo": f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n",
        "python": "#!/bin/sh\nexit 97\n",
    }.items():
        (scripts / name).write_text(body, encoding="utf-8")
        (scripts / name).chmod(0o755)
    for stamp in (".torch", ".package", ".model"):
        (scripts.parent / stamp).touch()
    return scripts.parent


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments],
        cwd=ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


PROMPTS = [
    "Why is the sky blue?",
    """it's "quoted" `id` $HOME $(id) ${x} $$ \\n \\ # %""",
    "$(shell touch EXECUTED) $5 or 5$",
    "two\nlines",
    "--help",
    "naïve 🎉",
]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("how", ["argument", "variable"])
def test_make_run_hands_the_prompt_over_as_it_was_typed(venv, prompt, how):
    given = {"PROMPT": prompt} if how == "variable" else {}
    done = make("run", f"VENV={venv}", *([] if given else [f"PROMPT={prompt}"]), **given)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == ["generate", "--quant", "int8", "--", prompt]
    assert not (ROOT / "EXECUTED").exists()


def test_make_run_has_a_prompt_and_a_quant_of_its_own(venv):
    done = make("run", f"VENV={venv}", "QUANT=llm-int8", PROMPT="x")
    assert json.loads(done.stdout)[:4] == ["generate", "--quant", "llm-int8", "--"]
    assert json.loads(make("run", f"VENV={venv}").stdout)[-1] == "Why is the sky blue?"


def test_an_old_python_is_refused_by_name(tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    old.chmod(0o755)
    done = make("install", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}")
    assert done.returncode != 0
    assert f'Octavo needs Python 3.11 or later, and "{old}" is not' in done.stderr
    assert not (tmp_path / "venv").exists()


def test_continuous_integration_runs_make_test_and_nothing_else():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = [line for line in script.splitlines() if line and not line.startswith("#")]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."', "exec make test"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    steps = re.findall(
        r"- run: (.*)", (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    )
    assert steps == ["make test"]

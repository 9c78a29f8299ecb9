"""The CPU kernels on their way into a wheel: with a compiler, without one, and where a release needs them."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from octavo.loading import load_backend, plan_model
from octavo.runners.cpu import library
from octavo.runners.cpu.library import NativeUnavailableError
from octavo.settings import Settings

ROOT = Path(__file__).parents[2]


def build(folder: Path, *, root: Path = ROOT, target: str = "wheel", **environment: str):
    return subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)],
        cwd=root,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def test_without_a_compiler_the_build_succeeds_and_says_what_runs_instead(tmp_path):
    done = build(tmp_path, PATH="/nowhere", CXX="")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in (done.stdout + done.stderr).splitlines() if "octavo: " in line)
    assert "CPU kernels not built" in line
    assert "the slower reference runner takes their place" in line
    assert "g++ 10" in line
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any("_native" in name for name in zipfile.ZipFile(wheel).namelist())


def test_a_release_is_not_built_without_kernels(tmp_path):
    done = build(tmp_path, PATH="/nowhere", CXX="", OCTAVO_REQUIRE_KERNELS="1")
    assert done.returncode != 0
    assert "no C++20 compiler" in done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_published_wheels_require_their_kernels():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    settings = project["tool"]["cibuildwheel"]
    assert settings["environment"]["OCTAVO_REQUIRE_KERNELS"] == "1"
    assert settings["macos"]["environment"]["OCTAVO_REQUIRE_KERNELS"] == "1"


@pytest.mark.model
def test_a_load_without_kernels_says_what_runs_instead(default_model_path, tmp_path, monkeypatch):
    def missing():
        return library.load(tmp_path / "_native.so")

    with pytest.raises(NativeUnavailableError):
        missing()
    monkeypatch.setattr("octavo.runners.cpu.kind.native", missing)
    monkeypatch.setattr("octavo.runners.cpu.library.native", missing)
    settings = Settings(model=str(default_model_path), device="cpu", context=64, cache=False)
    loaded = load_backend(plan_model(settings))
    loaded.backend.close()
    (notice,) = (each for each in loaded.notices if "runner" in each)
    assert notice.startswith(
        "the reference runner takes the place of the faster cpu runner: its kernels were not"
    )
    assert "install a C++20 compiler" in notice


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_wheel_made_from_the_source_distribution_runs_in_a_fresh_environment(tmp_path):
    assert build(tmp_path, target="sdist").returncode == 0
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (root,) = (tmp_path / "source").iterdir()
    done = build(tmp_path, root=root, OCTAVO_REQUIRE_KERNELS="1")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-any" not in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert sum("runners/cpu/_native" in name for name in names) == 1
    assert {"octavo/evaluate/texts/alice.txt", "octavo/evaluate/card.html.jinja"} <= set(names)
    # The dependencies come from this environment, the package from the wheel.
    venv.create(tmp_path / "fresh", system_site_packages=False, with_pip=True)
    python = tmp_path / "fresh" / "bin" / "python"
    install = ["-m", "pip", "install", "--no-deps", "--no-index", "-q", str(wheel)]
    subprocess.run([python, *install], check=True, timeout=120)
    dependencies = str(Path(pytest.__file__).parents[1])
    code = (
        "import sys; sys.path.append(sys.argv[1]); import octavo.runners.cpu.library as library; "
        "print(library.__file__); print(*library.supported_isas())"
    )
    ran = subprocess.run(
        [python, "-P", "-c", code, dependencies],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    where, isas = ran.stdout.splitlines()
    assert where.startswith(str(tmp_path / "fresh"))
    assert isas.split()[0] == "portable"

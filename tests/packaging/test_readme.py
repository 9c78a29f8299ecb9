"""Every command and example of the README runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.cli.layers import read_file
from octavo.settings import SamplingParams, Settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

INSTALLS = {
    'make run PROMPT="Why is the sky blue?"',
    "make test",
    "python3 -m venv .venv",
    ".venv/bin/pip install -c constraints.txt .",
}
"""Not run here: they install packages, and `make test` runs this test."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line not in INSTALLS]


@pytest.fixture(scope="module")
def folder(default_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the files the README's commands name, and a cache with the default model."""
    folder = tmp_path_factory.mktemp("readme")
    models = folder / "cache" / "models"
    models.mkdir(parents=True)
    os.link(default_model_path, models / "SmolLM2-135M-Instruct.Q4_1.gguf")
    (folder / "prompts.jsonl").write_text('{"prompt": "Hi", "max_new_tokens": 4}\n' * 2, encoding="utf-8")
    return folder


def run(command: list[str], folder: Path, stdin: str) -> subprocess.CompletedProcess[str]:
    scripts = Path(sys.executable).parent
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OCTAVO_")}
    return subprocess.run(
        command,
        cwd=folder,
        env=kept
        | {
            "PATH": f"{scripts}:{os.environ['PATH']}",
            "OCTAVO_CACHE": str(folder / "cache"),
            "OCTAVO_MAX_NEW_TOKENS": "32",  # where the command does not say
        },
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


@pytest.mark.model
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command, folder):
    command = command.removeprefix(".venv/bin/")
    done = run(["bash", "-euo", "pipefail", "-c", command], folder, "Hello\n/exit\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() or command == "octavo models pull default"
    assert "Traceback" not in done.stderr


@pytest.mark.model
def test_the_python_example_runs(folder):
    (example,) = blocks("python")
    done = run([sys.executable, "-W", "error", "-c", example], folder, "")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) >= 2


def test_the_settings_example_is_valid(tmp_path):
    (example,) = blocks("toml")
    path = tmp_path / "octavo.toml"
    path.write_text(example, encoding="utf-8")
    file = read_file(path, Settings, SamplingParams)
    assert set(file.layer) == {"quant", "temperature"}
    assert file.aliases["small"].fallback == "default"


def test_every_installing_command_is_still_there():
    lines = {line for block in blocks("sh") for line in block.splitlines()}
    assert lines >= INSTALLS
    assert len(COMMANDS) >= 10


def test_every_file_it_names_exists():
    (tree,) = re.findall(r"^```\n(src/octavo/.*?)^```", README, re.MULTILINE | re.DOTALL)
    parent = ""
    for line in tree.splitlines():
        words = line.split()
        if not line.startswith(" "):
            parent = words.pop(0)
            assert (ROOT / parent).is_dir(), parent
        if re.fullmatch(r"\w+(/|\.py|\.md)", words[0]):
            assert (ROOT / parent / words[0]).exists(), words[0]
    for link in re.findall(r"\]\((?!https)([^)]+)\)", README):
        assert (ROOT / link).exists(), link

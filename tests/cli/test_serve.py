"""`octavo serve` before it serves: what it takes from flags, variables and octavo.toml, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.cli.configuration import read_configuration
from octavo.cli.main import main


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in [name for name in os.environ if name.startswith("OCTAVO_")]:
        monkeypatch.delenv(name)


def test_how_to_serve_is_said_like_any_other_setting(monkeypatch):
    Path("octavo.toml").write_text(
        "context = 512\n[serve]\nport = 1000\nmax_queue = 3\nallow_host = 'a.example'\npreload = false"
    )
    settings, origins = read_configuration({}).serving()
    assert (settings.port, settings.max_queue, settings.allow_host) == (1000, 3, ("a.example",))
    assert settings.preload is False
    assert origins["port"] == "[serve] in octavo.toml"

    monkeypatch.setenv("OCTAVO_PORT", "2000")
    monkeypatch.setenv("OCTAVO_CORS_ORIGIN", '["http://a.example", "http://b.example"]')
    configuration = read_configuration({})
    assert configuration.notices == ()
    settings, origins = configuration.serving()
    assert (settings.port, settings.max_queue) == (2000, 3)
    assert settings.cors_origin == ("http://a.example", "http://b.example")
    assert origins["port"] == "OCTAVO_PORT"

    settings, origins = read_configuration({"port": 3000}).serving()
    assert (settings.port, origins["port"]) == (3000, "flag")
    assert read_configuration({}).resolve().settings.context == 512


def test_what_kubernetes_says_of_a_service_of_our_name_is_no_setting(monkeypatch):
    monkeypatch.setenv("OCTAVO_PORT", "tcp://10.0.0.1:80")
    monkeypatch.setenv("OCTAVO_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("OCTAVO_PORT_80_TCP_ADDR", "10.0.0.1")
    configuration = read_configuration({})
    assert configuration.serving()[0].port == 8000
    (notice,) = configuration.notices
    assert "OCTAVO_PORT is tcp://10.0.0.1:80" in notice
    assert "Kubernetes" in notice


def test_a_switch_that_is_on_is_named_by_its_off_form(monkeypatch):
    monkeypatch.setenv("OCTAVO_NO_PRELOAD", "1")
    assert read_configuration({}).serving()[0].preload is False


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[serve]\nprot = 1", ("prot in [serve]", "Did you mean port?")),
        ("[serve]\nport = 'x'", ("port in [serve]",)),
        ("[serve]\nmax_queue = 0", ("max_queue is 0", "[serve] in octavo.toml")),
        ("[sampling]\nn = 2", ("octavo.toml says n",)),
        ("[sampling]\nlogprobs = 2", ("octavo.toml says logprobs",)),
    ],
)
def test_what_is_wrong_in_a_file_is_named(capsys, text, said):
    Path("octavo.toml").write_text(text)
    assert main(["serve", "-m", "nothing"]) == 2
    written = capsys.readouterr().err
    for each in said:
        assert each in written


def test_config_shows_it(capsys, monkeypatch):
    monkeypatch.setenv("OCTAVO_PORT", "2000")
    assert main(["config", "--json"]) == 0
    assert '"port": {"value": 2000, "origin": "OCTAVO_PORT"}' in " ".join(capsys.readouterr().out.split())


def test_an_address_others_can_reach_needs_a_key(capsys):
    assert main(["serve", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "no API key" in capsys.readouterr().err


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "octavo", "serve", "--port", "0", "--offline", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_an_only_model_that_can_never_load_ends_the_server(tmp_path):
    """A service manager must see it: no server that answers 503 for ever."""
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    for model, code in (("no/such-model", 3), ("./missing.gguf", 3), ("./broken.gguf", 6)):
        ended = serve("-m", model)
        assert ended.returncode == code, ended.stderr
        assert "Traceback" not in ended.stderr
        assert model.removeprefix("./") in ended.stderr

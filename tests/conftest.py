"""What every test gets: no network but this machine, and the default model for those marked `model`."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from octavo.devices import Unusable, read_cuda_driver

if isinstance(read_cuda_driver(-1, os.environ), Unusable):
    # Triton reads it when it is first imported, which other libraries do; tests/runners_cuda needs its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    from octavo.devices import Unusable, read_machine

    cuda = read_machine("auto").cuda
    if isinstance(cuda, Unusable):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA device: {cuda.why}"))


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The GGUF of SmolLM2-135M-Instruct: $OCTAVO_TEST_MODEL, else where `octavo models pull default` put it."""
    named = os.environ.get("OCTAVO_TEST_MODEL")
    if named:
        return Path(named)
    from octavo.sources import default

    found = default.locate()
    if found is None:
        pytest.fail("the default model is not here: run `octavo models pull default`, or deselect -m model")
    return found


@pytest.fixture(scope="session")
def llama_cpp_models() -> Path:
    """llama.cpp's folder models/: $OCTAVO_TEST_LLAMA_CPP_MODELS, else where `make test` fetched it to."""
    named = os.environ.get("OCTAVO_TEST_LLAMA_CPP_MODELS")
    folder = Path(named) if named else Path(sys.prefix) / "llama-cpp-models"
    if not folder.is_dir():
        pytest.fail(f"run `python tests/fetch_llama_cpp_models.py {folder}`, or deselect -m reference_data")
    return folder


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections that leave this machine, so that no test depends on the network by accident."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def local_connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _refuse_remote(address[0])
        connect(self, address)

    def local_look_up(host: Any, *rest: Any, **options: Any) -> Any:
        _refuse_remote(host)
        return look_up(host, *rest, **options)

    monkeypatch.setattr(socket.socket, "connect", local_connect)
    monkeypatch.setattr(socket, "getaddrinfo", local_look_up)


def _refuse_remote(host: Any) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    try:
        local = name in (None, "", "localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        local = False
    if not local:
        raise OSError(f"tests have no network, and {name} is not this machine")

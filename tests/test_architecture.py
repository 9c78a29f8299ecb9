"""docs/architecture.md tells the truth, and imports point one way."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "octavo"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

_LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "types errors settings version units",
        "paths file_lock models.spec models.parameters",
        "models sources text nvml devices dtypes",
        "quant",
        "weights packing packed_cache packed_file",
        "runners.base runners",
        "load_plan plan_words plan validate engine",
        "backends",
        "loading load_facts explanation output_filter generation",
        "frontend",
        "llm",
        "evaluate bench",
        "server",
        "cli __main__",
    )
)
"""From the bottom up: a module imports only from its own package and from layers below its own."""

_ONLY_IN = {
    "torch": (
        "runners/reference/",
        "runners/cuda/",
        "evaluate/",
        "devices.py",
        "bench/transformers_child.py",
    ),
    "triton": ("runners/cuda/",),
    "huggingface_hub": ("sources/hub.py", "sources/hub_cache.py", "sources/hub_transfer.py"),
    "llguidance": ("text/grammar.py",),
    "transformers": ("bench/transformers_child.py",),
    "bitsandbytes": (),
    "llama_cpp": ("bench/llama_cpp_child.py",),
    "gguf": (),
    "pickle": (),
    "joblib": (),
    "dill": (),
    "starlette": ("server/",),
    "uvicorn": ("server/",),
    "msgpack": ("server/wire.py",),
    "prometheus_client": ("server/metrics.py",),
    "pynvml": ("nvml.py",),
}
"""Library -> where it may be imported. devices.py asks torch only whether its build has CUDA."""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


def layer_of(module: str) -> int:
    """`module` is dotted below octavo, as models.spec."""
    for level, names in enumerate(_LAYERS):
        if module in names:
            return level
    assert "." in module, f"{module} has no place in _LAYERS"
    return layer_of(module.rpartition(".")[0])


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path):
    own = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for name in imports(path):
        if name.startswith("octavo."):
            other = name.removeprefix("octavo.")
            same_package = other.split(".")[0] == own.split(".")[0]
            assert same_package or layer_of(other) <= layer_of(own), f"{own} imports {other}"
            lowest = own in _LAYERS[0]
            assert not lowest, f"{own} may import nothing of ours"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_libraries_stay_where_they_belong(path: Path):
    where = path.relative_to(PACKAGE).as_posix()
    for name in imports(path):
        allowed = _ONLY_IN.get(name.split(".")[0])
        assert allowed is None or where.startswith(allowed), f"{where} imports {name}"


def test_every_path_on_the_page_exists():
    paths = re.findall(r"`((?:src|docs|tests|benchmarks|csrc)/[\w/.-]+)`", PAGE)
    assert len(paths) > 20
    missing = [p for p in paths if not (ROOT / p).exists()]
    assert not missing


def test_every_name_on_the_page_exists():
    names = re.findall(r"`(octavo(?!\.toml)(?:\.\w+)+)`", PAGE)
    assert len(names) > 25
    for name in names:
        _resolve(name)


def test_every_package_is_on_the_page():
    for path in PACKAGE.iterdir():
        if path.is_dir() and any(path.glob("*.py")):
            assert f"`src/octavo/{path.name}`" in PAGE, path.name


def _resolve(name: str) -> object:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[cut:]:
            found = getattr(found, attribute)
        return found
    raise AssertionError(f"{name} does not exist")

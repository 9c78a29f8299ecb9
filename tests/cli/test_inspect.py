"""The commands that look and tidy: plan, models, cache, config."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from octavo.errors import NotEnoughMemoryError
from octavo.packed_cache import EntryFacts, PackedCache, cache_entries
from octavo.paths import cache_root
from octavo.sources import default, hub_cache
from octavo.sources.hub_cache import CachedModel


def pack(model: str, *, days_ago: float = 0.0, count_bytes: int = 1 << 20) -> None:
    """Put an entry into the cache."""
    root = cache_root()
    key = f"{len(cache_entries(root)):032x}"
    facts = EntryFacts(model=model, layout="ref-1", format="int8", formats={}, parameters={})
    with PackedCache(root).writing(key, facts, array_bytes=count_bytes, arrays=1) as append:
        append("x", np.zeros(count_bytes, np.int8))
    used = time.time() - days_ago * 86400
    os.utime(next(root.rglob(f"{key}.json")), (used, used))


@pytest.fixture(autouse=True)
def _own_caches(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        hub_cache, "cached_models", lambda: (CachedModel("org/cached", 5 << 20, ("0" * 40,), 0.0),)
    )
    monkeypatch.setattr(
        hub_cache, "cached_name", lambda name: name if name.partition(":")[0] == "org/cached" else None
    )


# --- plan ------------------------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.parametrize("how", [["-m"], []])
def test_plan_as_tables_and_as_json(cli, default_model_path, how):
    done = cli(
        "plan", *how, str(default_model_path), "--quant", "int8", "--device", "cpu", "--context", "512"
    )
    assert done.code == 0, done.err
    for word in ("int8", "f32", "weights", "kv", "peak, loading or running", "usable", "context 512", "MiB"):
        assert word in done.out
    facts = json.loads(cli("plan", *how, str(default_model_path), "--device", "cpu", "--json").out)
    assert facts["device"] == "cpu"
    assert facts["packed_bytes"] > 0
    assert not cli.llm.loads


@pytest.mark.model
def test_a_plan_that_cannot_fit_is_exit_4(cli, default_model_path, monkeypatch):
    def refuse(**_):
        raise NotEnoughMemoryError("too big", remedy="smaller", needed_bytes=2, available_bytes=1)

    monkeypatch.setattr("octavo.loading.make_plan", refuse)
    done = cli("plan", str(default_model_path), "--device", "cpu")
    assert (done.code, done.out, done.err_lines) == (4, "", ["error: too big", "  fix: smaller"])


@pytest.mark.model
def test_a_plan_is_of_the_model_that_would_be_loaded(cli, default_model_path):
    text = f'[models.a]\nmodel = "./none"\nfallback = "{default_model_path}"\n'
    Path("octavo.toml").write_text(text, encoding="utf-8")
    done = cli("plan", "a", "--device", "cpu", "--json")
    assert done.code == 0
    assert done.err_lines[0].endswith(f"taking the fallback {default_model_path}")
    assert json.loads(done.out)["model"] == str(default_model_path)


# --- models ------------------------------------------------------------------------------------------------


def test_models_list(cli):
    done = cli("models", "list")
    assert [line.split() for line in done.out.splitlines()] == [
        ["model", "from", "size"],
        ["SmolLM2-135M-Instruct", "default", "not", "fetched"],
        ["org/cached", "hub", "5", "MiB"],
    ]
    assert json.loads(cli("models", "list", "--json").out)[1] == {
        "model": "org/cached",
        "from": "hub",
        "bytes": 5 << 20,
    }


@pytest.mark.model
def test_models_show(cli, default_model_path):
    facts = json.loads(cli("models", "show", str(default_model_path), "--json").out)
    assert (facts["family"], facts["layers"], facts["vocabulary"]) == ("llama", 30, 49152)
    assert (facts["parameters"], facts["license"]) == (134_515_008, "apache-2.0")
    assert facts["chat_template"] is True
    text = cli("models", "show", str(default_model_path)).out
    assert "134,515,008" in text
    assert "q4_1" in text


def test_models_pull_default(cli, monkeypatch):
    monkeypatch.setattr(default, "pull", lambda progress, folder: Path("/there"))
    done = cli("models", "pull")
    assert (done.code, done.out, done.err) == (0, "", "SmolLM2-135M-Instruct is in /there\n")


def test_models_show_of_nothing_is_exit_3(cli):
    done = cli("models", "show", "./nowhere")
    assert (done.code, done.out, len(done.err_lines)) == (3, "", 2)


@pytest.mark.parametrize("name", ["default", "SmolLM2-135M-Instruct"])
def test_the_default_model_has_two_names(cli, name):
    done = cli("models", "show", name, "--offline")
    assert (done.code, done.err_lines[1]) == (3, "  fix: Run once with a network: octavo models pull default")


def test_models_rm_takes_the_packed_weights_too(cli, monkeypatch):
    pack("org/cached")
    pack("org/cached:name-Q4_1.gguf")
    pack("org/other")
    removed = []
    monkeypatch.setattr(hub_cache, "remove_cached", lambda name: removed.append(name) or 5 << 20)
    done = cli("models", "rm", "org/cached")
    assert (done.code, done.err) == (0, "removed org/cached: freed 7 MiB\n")
    assert removed == ["org/cached"]
    assert [entry.model for entry in cache_entries(cache_root())] == ["org/other"]


def test_models_rm_of_the_default_model(cli):
    path = cache_root() / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(default.FILE_BYTES)
    assert cli("models", "rm", "default").code == 0
    assert not path.exists()
    done = cli("models", "rm", "default")
    assert (done.code, len(done.err_lines)) == (3, 2)


# --- cache -------------------------------------------------------------------------------------------------


def test_cache_size(cli):
    pack("org/a")
    pack("org/b", count_bytes=2 << 20, days_ago=1)
    facts = json.loads(cli("cache", "size", "--json").out)
    assert facts["total_bytes"] == sum(entry["nbytes"] for entry in facts["entries"])
    assert [entry["model"] for entry in facts["entries"]] == ["org/a", "org/b"]
    text = cli("cache", "size").out
    assert "org/a" in text
    assert "3 MiB" in text


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--all"], []),
        (["--older-than", "2"], ["new", "day"]),
        (["--older-than", "0.5"], ["new"]),
        (["--max-size", "0.0015"], ["new"]),
        (["--max-size", "1"], ["new", "day", "week"]),
    ],
)
def test_cache_prune(cli, flags, kept):
    for name, days_ago in (("new", 0.0), ("day", 1.0), ("week", 7.0)):
        pack(name, days_ago=days_ago)
    done = cli("cache", "prune", *flags)
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith("freed ")
    assert [entry.model for entry in cache_entries(cache_root())] == kept


def test_the_cache_folder_may_be_named(cli, tmp_path):
    folder = tmp_path / "elsewhere"
    assert json.loads(cli("cache", "size", "--json", "--cache-dir", str(folder)).out)["folder"] == str(folder)


# --- config ------------------------------------------------------------------------------------------------


def test_config_says_where_each_value_came_from(cli, monkeypatch):
    Path("octavo.toml").write_text("threads = 2\n[models.a]\nmodel = './none'\nquant = 'int8'\n")
    monkeypatch.setenv("OCTAVO_CONTEXT", "128")
    facts = json.loads(cli("config", "-m", "a", "--top-k", "5", "--json").out)
    assert facts["model"] == {"value": "./none", "origin": "[models.a] in octavo.toml"}
    assert facts["quant"] == {"value": "int8", "origin": "[models.a] in octavo.toml"}
    assert facts["threads"] == {"value": 2, "origin": "octavo.toml"}
    assert facts["context"] == {"value": 128, "origin": "OCTAVO_CONTEXT"}
    assert facts["top_k"] == {"value": 5, "origin": "--top-k"}
    assert facts["temperature"] == {"value": None, "origin": "default"}
    rows = [line.split() for line in cli("config", "-m", "a").out.splitlines()]
    assert ["context", "128", "OCTAVO_CONTEXT", "OCTAVO_CONTEXT"] in rows
    assert ["cache", "true", "default", "OCTAVO_NO_CACHE"] in rows


def test_config_shows_what_the_model_says(cli, monkeypatch):
    class Source:
        generation_config = {"temperature": 0.25, "top_k": 7, "top_p": 1.0}  # noqa: RUF012

    monkeypatch.setattr("octavo.sources.resolve.resolve", lambda *_, **__: Source)
    facts = json.loads(cli("config", "--top-k", "5", "--json").out)
    assert facts["temperature"] == {"value": 0.25, "origin": "model"}
    assert facts["top_k"] == {"value": 5, "origin": "--top-k"}
    assert facts["top_p"] == {"value": None, "origin": "default"}

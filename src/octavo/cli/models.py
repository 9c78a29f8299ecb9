"""`octavo models`: what is on this machine, fetching, inspecting and removing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.configuration import read_configuration
from octavo.cli.facts import storage_facts
from octavo.cli.options import Given, accepts, with_model
from octavo.cli.output import note, note_all, write_json, write_table
from octavo.cli.progress import progress_bars
from octavo.errors import ModelNotFoundError
from octavo.settings import Settings

if TYPE_CHECKING:
    from octavo.types import ModelSource

app = typer.Typer(help="List, pull, show and remove models.", rich_markup_mode=None)

_DEFAULT = "default"
_Name = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hub id (org/name, org/name:Q4_K_M), name from octavo.toml, or default (the default model).",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
@accepts(Settings, only=("cache_dir",))
def list_(*, json: _Json = False, said: Given) -> None:
    """List the models on this machine.

    They are the default one and those in the hub's cache.
    """
    from octavo.sources import default
    from octavo.sources.hub_cache import cached_models
    from octavo.units import readable_bytes

    settings = read_configuration(said).resolve().settings
    path = default.locate(settings.cache_dir)
    rows: list[dict[str, Any]] = [
        {"model": default.NAME, "from": _DEFAULT, "bytes": 0 if path is None else path.stat().st_size}
    ]
    rows += [{"model": each.name, "from": "hub", "bytes": each.size_bytes} for each in cached_models()]
    if json:
        write_json(rows)
        return
    from rich.table import Table

    table = Table("model", "from", box=None, pad_edge=False)
    table.add_column("size", justify="right")
    for row in rows:
        size = readable_bytes(row["bytes"]) if row["bytes"] else "not fetched"
        table.add_row(row["model"], row["from"], size)
    write_table(table)


@app.command()
@accepts(Settings, only=("revision", "cache_dir"))
def pull(name: _Name = _DEFAULT, *, said: Given) -> None:
    """Fetch a model, or see that it is here and undamaged."""
    from octavo.sources import default

    settings = read_configuration(with_model(said, name)).resolve().settings
    with progress_bars() as progress:
        if settings.model == _DEFAULT and settings.revision is None:
            note(f"{default.NAME} is in {default.pull(progress, settings.cache_dir)}")
            return
        from octavo.sources.resolve import resolve

        source = resolve(
            settings.model, revision=settings.revision, cache_dir=settings.cache_dir, progress=progress
        )
    note_all(source.notices)
    note(f"{source.location} is here" + ("" if source.revision is None else f", at commit {source.revision}"))


@app.command()
@accepts(Settings, only=("revision", "offline", "cache_dir"))
def show(name: _Name = _DEFAULT, *, json: _Json = False, said: Given) -> None:
    """Show what a model is.

    Its structure, formats, sizes, template and license, from its headers.
    """
    from octavo.sources.resolve import resolve

    settings = read_configuration(with_model(said, name)).resolve().settings
    with progress_bars() as progress:
        source = resolve(
            settings.model,
            revision=settings.revision,
            offline=settings.offline,
            cache_dir=settings.cache_dir,
            progress=progress,
        )
    facts = _facts(source, settings)
    if json:
        write_json(facts)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), Text(_in_words(key, value)))
    write_table(table)
    note_all((*storage_facts(source), *source.notices))


@app.command("rm")
@accepts(Settings, only=("cache_dir",))
def remove(name: _Name, *, said: Given) -> None:
    """Remove a fetched model and its packed weights. A folder or file of yours stays as it is."""
    from octavo.loading import kept_name
    from octavo.packed_cache import PackedCache, cache_entries
    from octavo.paths import cache_root
    from octavo.sources import default
    from octavo.sources.hub_cache import cached_name, remove_cached
    from octavo.units import readable_bytes

    settings = read_configuration(with_model(said, name)).resolve().settings
    root = cache_root(settings.cache_dir)
    model = default.NAME if settings.model in (None, _DEFAULT) else str(settings.model)
    in_hub = cached_name(model)
    model = in_hub or model
    fetched = default.locate(settings.cache_dir) if model == default.NAME else None
    kept = kept_name(model)
    packed = [
        entry
        for entry in cache_entries(root)
        if entry.model == kept or (in_hub and entry.model.startswith(f"{model}:"))  # a GGUF file of it
    ]
    if fetched is None and not packed and in_hub is None:
        raise ModelNotFoundError(
            f"nothing of {model} is kept on this machine", remedy="See what is there: octavo models list"
        )
    freed_bytes = sum(entry.nbytes for entry in packed)
    cache = PackedCache(root)
    for entry in packed:
        cache.discard(entry.key)
    if fetched is not None:
        freed_bytes += fetched.stat().st_size
        fetched.unlink()
    if in_hub is not None:
        freed_bytes += remove_cached(in_hub)
    note(f"removed {model}: freed {readable_bytes(freed_bytes)}")


def _facts(source: ModelSource, settings: Settings) -> dict[str, Any]:
    from octavo.evaluate.card_store import kept
    from octavo.models import build_model
    from octavo.paths import cache_root

    spec, _ = build_model(source.config, source.naming, tensors=source.tensors)
    mixers = Counter((layer.mixer.heads, layer.mixer.kv_heads, layer.mixer.head_dim) for layer in spec.layers)
    file_bytes: Counter[str] = Counter()
    for tensor in source.tensors.values():
        file_bytes[tensor.dtype] += tensor.nbytes
    return {
        "model": source.location,
        "revision": source.revision,
        "family": spec.family,
        "parameters": sum(math.prod(tensor.shape) for tensor in source.tensors.values()),
        "layers": len(spec.layers),
        "hidden_size": spec.hidden_size,
        "heads": [f"{heads} ({kv} for keys and values) of {dim}" for heads, kv, dim in mixers],
        "windows": sorted({layer.mixer.window for layer in spec.layers if layer.mixer.window is not None}),
        "vocabulary": spec.vocab_size,
        "context_tokens": spec.max_context_tokens,
        "tied_head": spec.tied_head,
        "file_bytes": dict(file_bytes.most_common()),
        "tokenizer": None if source.tokenizer is None else source.tokenizer.kind,
        "chat_template": source.chat_template is not None,
        "license": _license(source, settings),
        "quality": list(kept(cache_root(settings.cache_dir), source.fingerprint).values()),
    }


def _license(source: ModelSource, settings: Settings) -> str | None:
    """What the model's own file says: GGUF has a place for it, safetensors folders have none."""
    from octavo.sources import default
    from octavo.sources.gguf import read_gguf

    path = default.locate(settings.cache_dir) if source.location == default.NAME else Path(source.location)
    if source.naming != "gguf" or path is None or not path.is_file():
        return None
    said = read_gguf(path).metadata.get("general.license")
    return None if said is None else str(said)


def _in_words(key: str, value: Any) -> str:
    from octavo.units import readable_bytes

    if value is None or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{readable_bytes(count)} as {dtype}" for dtype, count in value.items())
    if isinstance(value, list):
        return ("\n" if key == "quality" else ", ").join(str(each) for each in value)
    return f"{value:,}" if key == "parameters" else str(value)

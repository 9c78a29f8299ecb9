"""The weight store: the same numbers from memory, from a fresh entry and from the cache."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from octavo.errors import ClosedError, ModelFormatError
from octavo.models import build_model
from octavo.quant import REF1
from octavo.quant.format import Bundle
from octavo.weights import cache_entries, choose_formats, open_weights


@pytest.mark.parametrize("quant", ["auto", "none", "llm-int8"])
def test_memory_fresh_and_cached_are_the_same(checkpoint, tmp_path, content, assert_same, quant):
    memory = checkpoint.open(None, quant=quant)
    fresh = checkpoint.open(tmp_path, quant=quant)
    cached = checkpoint.open(tmp_path, quant=quant)
    assert (memory.from_cache, fresh.from_cache, cached.from_cache) == (False, False, True)
    for store in (fresh, cached):
        assert_same(content(store), content(memory))
        assert list(store) == [parameter.name for parameter in checkpoint.parameters]
        assert store.digest == memory.digest
        assert store.nbytes == memory.nbytes == sum(array.nbytes for array in content(store).values())
        assert store.notices == ()
        assert store.layout is REF1


def test_parameters_are_unpacked_as_their_format_says(checkpoint, tmp_path):
    for cache in (None, tmp_path):
        store = checkpoint.open(cache, quant="none")
        for parameter in checkpoint.parameters:
            bits = checkpoint.tensors[parameter.source].values.astype(np.uint32) << 16
            values = store.unpack(parameter.name)
            np.testing.assert_array_equal(values, bits.view(np.float32))
            assert values.shape == store.shape(parameter.name) == parameter.shape
            assert values.flags.writeable
            form, arrays = store.parameter(parameter.name)
            assert form == store[parameter.name].formats[0]
            assert arrays is store[parameter.name].arrays


def test_arrays_are_read_only_and_aligned(checkpoint, tmp_path):
    checkpoint.open(tmp_path)
    for store in (checkpoint.open(None), checkpoint.open(tmp_path)):
        for bundle in store.values():
            for array in bundle.arrays.values():
                with pytest.raises(ValueError, match="read-only"):
                    array[...] = 0
                if store.from_cache:
                    assert array.ctypes.data % 64 == 0


def test_the_file_is_safetensors(checkpoint, tmp_path, expected, assert_same):
    checkpoint.open(tmp_path)
    (entry,) = cache_entries(tmp_path)
    arrays = load_file(entry.path)
    padding = {name for name in arrays if name.startswith("__padding__")}
    assert padding, "odd widths need it"
    assert_same({name: arrays[name] for name in arrays.keys() - padding}, expected)


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_folders_and_files_are_private(checkpoint, tmp_path):
    old = os.umask(0)
    try:
        checkpoint.open(tmp_path / "cache")
    finally:
        os.umask(old)
    for path in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_without_the_cache_nothing_is_written(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    checkpoint.open(None)
    assert not (tmp_path / "cache").exists()


@dataclass(frozen=True)
class Fused:
    """Two parameters a bundle, stacked where their arrays fit; names with dots as runners have them."""

    id: str = "fused-1"

    def bundles(self, parameters):
        pairs = [tuple(parameters[i : i + 2]) for i in range(0, len(parameters), 2)]
        return tuple(Bundle("+".join(p.name for p in pair), pair) for pair in pairs)

    def arrange(self, bundle, packed):
        return {
            f"{name}{i}": np.flip(array, 0)
            for i, (_, arrays) in enumerate(packed)
            for name, array in arrays.items()
        }


def test_a_layout_of_several_parameters_a_bundle(checkpoint, tmp_path, expected, content, assert_same):
    memory = checkpoint.open(None, layout=Fused())
    checkpoint.open(tmp_path, layout=Fused())
    store = checkpoint.open(tmp_path, layout=Fused())
    assert store.from_cache
    assert_same(content(store), content(memory))
    first = store["embedding.weight+layers.0.mixer.q.weight"]
    assert [p.name for p in first.parameters] == ["embedding.weight", "layers.0.mixer.q.weight"]
    assert [f.name for f in first.formats] == ["int8", "int8"]
    np.testing.assert_array_equal(first.arrays["codes1"][::-1], expected["layers.0.mixer.q.weight.codes"])
    with pytest.raises(AssertionError, match="fused-1"):
        store.unpack("embedding.weight")


def test_whatever_decides_the_bytes_is_in_the_key(checkpoint, tmp_path):
    """Each change makes an entry of its own; none is ever mistaken for another."""
    one = checkpoint.parameters[-1]
    variants = [
        checkpoint.open(tmp_path),
        checkpoint.open(tmp_path, quant="llm-int8"),
        checkpoint.open(tmp_path, layout=Fused()),
        checkpoint.open(tmp_path, fingerprint="e" * 64),
        replace(checkpoint, parameters=(*checkpoint.parameters[:-1], replace(one, add=-1.0))).open(tmp_path),
    ]
    assert not any(store.from_cache for store in variants)
    assert len(cache_entries(tmp_path)) == len(variants)
    # Other weights under the same digest would poison prefix reuse; the same weights may share it.
    assert len({store.digest for store in variants}) == len(variants) - 1
    assert variants[3].digest == variants[0].digest


def test_the_packing_version_is_in_the_key(checkpoint, tmp_path, monkeypatch):
    checkpoint.open(tmp_path)
    monkeypatch.setattr("octavo.weights.PACKING_VERSION", 2)
    assert not checkpoint.open(tmp_path).from_cache


def test_released_bundles_and_closed_stores_say_so(checkpoint, tmp_path):
    checkpoint.open(tmp_path)
    for store in (checkpoint.open(None), checkpoint.open(tmp_path)):
        kept = store["embedding.weight"].arrays["codes"]
        before = kept.copy()
        store.release("embedding.weight")
        np.testing.assert_array_equal(kept, before)
        with pytest.raises(ClosedError, match=r"embedding\.weight were released"):
            store["embedding.weight"]
        assert "embedding.weight" in list(store)
        store["layers.0.mixer.q.weight"]
        store.close()
        store.close()
        with pytest.raises(ClosedError):
            store["layers.0.mixer.q.weight"]
        with pytest.raises(KeyError):
            store["no such weight"]
        np.testing.assert_array_equal(kept, before)


def test_progress_is_complete_and_names_what_is_done(checkpoint, tmp_path):
    calls: list[tuple[str, int, int | None]] = []
    for _ in range(2):
        checkpoint.open(tmp_path, progress=lambda *call: calls.append(call))
    for stage in ("packing int8", "loading"):
        steps = [call for call in calls if call[0] == stage]
        assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
        assert steps[-1][1] == steps[-1][2]
    assert calls[-1][0] == "loading"
    assert [stage for stage, _, _ in calls].index("loading") > 0


def test_a_broken_checkpoint_leaves_nothing_behind(checkpoint, tmp_path):
    last = checkpoint.parameters[-1].source
    values = checkpoint.tensors[last].values.copy()
    values[-1] = 0x7F80
    broken = checkpoint.tensors | {last: replace(checkpoint.tensors[last], values=values)}
    with pytest.raises(ModelFormatError, match="pre_mixer"):
        replace(checkpoint, tensors=broken).open(tmp_path)
    assert list((tmp_path / "packed").iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's smaps")
def test_released_pages_go_back(checkpoint, tmp_path):
    def resident_bytes(path: Path) -> int:
        maps = Path("/proc/self/smaps").read_text()
        return sum(
            int(line.split()[1]) * 1024
            for part in maps.split(str(path))[1:]
            for line in part.splitlines()[:6]
            if line.startswith("Rss:")
        )

    big = replace(
        checkpoint,
        parameters=(replace(checkpoint.parameters[0], shape=(4096, 512)),),
        tensors={
            checkpoint.parameters[0].source: replace(
                checkpoint.tensors[checkpoint.parameters[0].source],
                shape=(4096, 512),
                values=np.full((4096, 512), 0x3F80, np.uint16),
            )
        },
    )
    store = big.open(tmp_path)
    (entry,) = cache_entries(tmp_path)
    assert resident_bytes(entry.path) > 2 << 20, "verifying has read it all"
    store.release("embedding.weight")
    assert resident_bytes(entry.path) < 1 << 18
    store.close()
    assert resident_bytes(entry.path) == 0


@pytest.mark.model
def test_the_default_model_as_stored_is_its_dequantized_file(default_model_path, tmp_path):
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    from octavo.sources.gguf_model import load_gguf

    source = load_gguf(default_model_path, location="default")
    _, parameters = build_model(source.config, source.naming)
    formats = choose_formats(parameters, source.tensors, "auto")
    assert {form.name for form in formats.values()} == {"q4_1", "q8_0", "f32"}
    for use_cache in (False, True):
        store = open_weights(
            model="default",
            fingerprint=source.fingerprint,
            tensors=source.tensors,
            parameters=parameters,
            formats=formats,
            layout=REF1,
            cache_dir=tmp_path,
            use_cache=use_cache,
        )
        if use_cache:
            break
        digest = store.digest
    assert store.digest == digest
    for parameter in parameters:
        if parameter.name.startswith("layers.") and not parameter.name.startswith(
            ("layers.0.", "layers.29.")
        ):
            continue  # the package's dequantizer takes seconds for all of them
        tensor = source.tensors[parameter.source]
        values = dequantize(tensor.read(), GGMLQuantizationType[tensor.dtype.upper()])
        if parameter.unpermute_heads is not None:
            pairs = values.reshape(parameter.unpermute_heads, -1, 2, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        np.testing.assert_array_equal(store.unpack(parameter.name), values, err_msg=parameter.name)

"""The weights a runner gets: packed once, kept on disk, mapped at the next start.

`open_weights` turns a checkpoint's tensors into a `WeightStore` in a layout, from the packed cache where it
can, else one bundle at a time: read, pack, arrange, append. Which numbers a parameter packs to is
`octavo.packing`'s work, files are `octavo.packed_cache`'s.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from octavo.errors import ClosedError
from octavo.file_lock import Lock
from octavo.models.parameters import Parameter
from octavo.packed_cache import CacheEntry, EntryFacts, PackedCache, cache_entries, prune
from octavo.packed_file import DamagedFileError, PackedFile, array_bytes
from octavo.packing import choose_formats, pack_parameter
from octavo.paths import cache_root
from octavo.quant.format import Bundle, Format, Layout
from octavo.quant.logical_layout import REF1
from octavo.types import Progress, TensorRef

__all__ = [
    "CacheEntry",
    "StoredBundle",
    "WeightStore",
    "cache_entries",
    "choose_formats",
    "open_weights",
    "prune",
]

PACKING_VERSION = 1
"""Part of every cache key: goes up when the same source, format and layout would pack to other numbers."""

_PARAMETER_FIELDS = tuple(field.name for field in fields(Parameter))
_ARRAYS_A_PARAMETER = 4
"""Most arrays a layout makes, on average: room in the file's header."""

_WAIT_SECONDS = 1800.0
"""How long another process may take to pack the same weights before we pack our own in memory."""


@dataclass(frozen=True, slots=True)
class StoredBundle:
    """A layout's arrays for the parameters it stores together."""

    name: str
    parameters: tuple[Parameter, ...]
    formats: tuple[Format, ...]
    """One a parameter."""
    arrays: Mapping[str, np.ndarray]
    """Read-only."""


class WeightStore(Mapping[str, StoredBundle]):
    """Bundles by name, in load order. Arrays are the mapped pages of the cache, or in memory without one.

    Asking for a bundle that was released, or for any after `close`, raises ClosedError.
    """

    def __init__(
        self,
        *,
        layout: Layout,
        bundles: Sequence[StoredBundle],
        digest: str,
        mapped: PackedFile | None,
        from_cache: bool,
        notices: tuple[str, ...],
    ) -> None:
        self.layout = layout
        self.digest = digest
        """SHA-256 hex of layout, formats and every stored byte: equal digests compute the same model."""
        self.from_cache = from_cache
        """Nothing was packed."""
        self.notices = notices
        """What the user should know, e.g. that a damaged entry was made again."""
        self.nbytes = sum(array.nbytes for bundle in bundles for array in bundle.arrays.values())
        self._names = dict.fromkeys(bundle.name for bundle in bundles)
        self._bundles = {bundle.name: bundle for bundle in bundles}
        self._mapped = mapped

    def __getitem__(self, name: str) -> StoredBundle:
        if name not in self._names:
            raise KeyError(name)
        try:
            return self._bundles[name]
        except KeyError:
            raise ClosedError(
                f"the weights {name} were released", remedy="Open the weights again to read them."
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def parameter(self, name: str) -> tuple[Format, Mapping[str, np.ndarray]]:
        """Format and logical arrays of one parameter. Only in layout `ref-1`, as `shape` and `unpack`."""
        bundle = self._logical(name)
        return bundle.formats[0], bundle.arrays

    def shape(self, name: str) -> tuple[int, ...]:
        """[N, K] of a matrix, [N] of a vector."""
        return self._logical(name).parameters[0].shape

    def unpack(self, name: str) -> np.ndarray:
        """The parameter's float32 values, of its shape, in an array of their own."""
        bundle = self._logical(name)
        values = bundle.formats[0].unpack(bundle.arrays, bundle.parameters[0].shape[-1])
        return values if values.flags.writeable else values.copy()

    def _logical(self, name: str) -> StoredBundle:
        assert self.layout.id == REF1.id, f"layout {self.layout.id} has no arrays of single parameters"
        return self[name]

    def release(self, name: str) -> None:
        """The caller has its own copy of this bundle: give its memory back, and its name up.

        Arrays the caller still holds stay valid.
        """
        self.drop_pages(name)
        del self._bundles[name]

    @property
    def is_mapped(self) -> bool:
        """Arrays are pages of a file, which the system can take back and read again."""
        return self._mapped is not None

    def drop_pages(self, name: str) -> None:
        """Give back the mapped pages of this bundle, if it has any: touching its arrays reads the file again."""
        if self._mapped is not None:
            self._mapped.drop_pages([_array_name(name, array) for array in self[name].arrays])

    def close(self) -> None:
        """Give all memory back, now or with the last array somebody still holds. Idempotent."""
        self._bundles.clear()
        if self._mapped is not None:
            self._mapped.close()


def open_weights(
    *,
    model: str,
    fingerprint: str,
    tensors: Mapping[str, TensorRef],
    parameters: Sequence[Parameter],
    formats: Mapping[str, Format],
    layout: Layout,
    cache_dir: Path | None,
    use_cache: bool,
    progress: Progress | None = None,
) -> WeightStore:
    """The parameters, in `formats` and `layout`: mapped from the packed cache, or packed now.

    `model` is what people call it, `fingerprint` what `ModelSource` says; `cache_dir` None is the default
    of `octavo.paths.cache_root`. Without `use_cache` the store is in memory; with it, packing takes the
    memory of one bundle, logical and arranged, and a few MiB. An entry that fails verification is removed
    and made again. Raises what `pack_parameter` raises, NotEnoughDiskError and CacheError.
    """
    load = _Load(model, tensors, tuple(parameters), formats, layout, layout.bundles(parameters), progress)
    if not use_cache:
        return load.in_memory(())
    cache = PackedCache(cache_root(cache_dir))
    key = load.key(fingerprint)
    damage: list[str] = []
    store = load.from_cache(cache, key, damage, packed_now=False)
    if store is not None:
        return store
    with cache.exclusive(key, wait_seconds=_WAIT_SECONDS, waiting=load.report_waiting) as lock:
        if lock is Lock.BUSY:
            minutes = round(_WAIT_SECONDS / 60)
            busy = f"another process has been packing {model} for {minutes} minutes: packed in memory"
            return load.in_memory((busy,))
        # Whoever held the lock before us may have made the entry.
        store = load.from_cache(cache, key, damage, packed_now=False)
        if store is not None:
            return store
        if damage:
            cache.discard(key)
        load.into_cache(cache, key)
        store = load.from_cache(cache, key, damage, packed_now=True)
    # Pruned by somebody at once, or a disk that does not give back what it got: go on without it.
    return load.in_memory(tuple(damage)) if store is None else store


@dataclass(frozen=True, slots=True)
class _Load:
    """One call of `open_weights`."""

    model: str
    tensors: Mapping[str, TensorRef]
    parameters: tuple[Parameter, ...]
    formats: Mapping[str, Format]
    layout: Layout
    bundles: tuple[Bundle, ...]
    progress: Progress | None

    def __post_init__(self) -> None:
        in_bundles = [parameter.name for bundle in self.bundles for parameter in bundle.parameters]
        assert sorted(in_bundles) == sorted(parameter.name for parameter in self.parameters)

    def key(self, fingerprint: str) -> str:
        """Of everything that decides the stored bytes: 32 hex digits."""
        manifests = self._manifests()
        return _sha256_json(
            {
                "packing": PACKING_VERSION,
                "fingerprint": fingerprint,
                "layout": self.layout.id,
                "parameters": [
                    {name: getattr(parameter, name) for name in _PARAMETER_FIELDS}
                    | {"format": manifests[self.formats[parameter.name]]}
                    for parameter in self.parameters
                ],
            }
        )[:32]

    def in_memory(self, notices: tuple[str, ...]) -> WeightStore:
        stored: list[StoredBundle] = []
        hashes: dict[str, str] = {}
        for bundle in self._each_bundle():
            arrays = {name: _read_only(array) for name, array in self._pack(bundle).items()}
            for name, array in arrays.items():
                hashes[_array_name(bundle.name, name)] = hashlib.sha256(array_bytes(array)).hexdigest()
            stored.append(self._stored(bundle, arrays))
        return self._store(stored, hashes, mapped=None, packed_now=True, notices=notices)

    def into_cache(self, cache: PackedCache, key: str) -> None:
        facts = EntryFacts(
            model=self.model,
            layout=self.layout.id,
            format=self._format_names(),
            formats={chosen.name: chosen.to_manifest() for chosen in self.formats.values()},
            parameters={parameter.name: self.formats[parameter.name].name for parameter in self.parameters},
        )
        arrays_at_most = _ARRAYS_A_PARAMETER * len(self.parameters)
        with cache.writing(key, facts, array_bytes=self._total_bytes(), arrays=arrays_at_most) as append:

            def pack_and_append(bundle: Bundle) -> None:
                for name, array in self._pack(bundle).items():
                    append(_array_name(bundle.name, name), array)

            for bundle in self._each_bundle():
                pack_and_append(bundle)  # a call of its own: nothing of one bundle outlives it

    def from_cache(
        self, cache: PackedCache, key: str, damage: list[str], *, packed_now: bool
    ) -> WeightStore | None:
        """The verified entry; None where there is none, or a damaged one, which `damage` then says."""
        total = self._total_bytes()

        def report(done_bytes: int) -> None:
            self._report("loading", min(done_bytes, total), total)

        try:
            found = cache.load(key, report)
            if found is None:
                return None
            mapped, contents = found
            arrays: dict[str, dict[str, np.ndarray]] = {bundle.name: {} for bundle in self.bundles}
            for name, array in mapped.arrays.items():
                bundle_name, _, array_name = name.rpartition(".")
                if bundle_name not in arrays:
                    raise DamagedFileError(f"{name} is of no bundle of layout {self.layout.id}")
                arrays[bundle_name][array_name] = array
        except DamagedFileError as error:
            damage[:] = [f"the packed weights of {self.model} were damaged and are made again: {error}"]
            return None
        hashes = {array.name: array.sha256 for array in contents.arrays if not array.is_padding}
        stored = [self._stored(bundle, arrays[bundle.name]) for bundle in self.bundles]
        return self._store(stored, hashes, mapped=mapped, packed_now=packed_now, notices=tuple(damage))

    def report_waiting(self) -> None:
        self._report("waiting for another process that packs these weights", 0, None)

    def _each_bundle(self) -> Iterator[Bundle]:
        """The bundles in load order, reporting progress as each one is done."""
        stage, done, total = f"packing {self._format_names()}", 0, self._total_bytes()
        for bundle in self.bundles:
            yield bundle
            done += sum(map(self._parameter_bytes, bundle.parameters))
            self._report(stage, done, total)

    def _pack(self, bundle: Bundle) -> dict[str, np.ndarray]:
        formats = [self.formats[parameter.name] for parameter in bundle.parameters]
        logical = [
            (chosen, pack_parameter(parameter, self.tensors, chosen))
            for parameter, chosen in zip(bundle.parameters, formats, strict=True)
        ]
        return self.layout.arrange(bundle, logical)

    def _stored(self, bundle: Bundle, arrays: Mapping[str, np.ndarray]) -> StoredBundle:
        formats = tuple(self.formats[parameter.name] for parameter in bundle.parameters)
        return StoredBundle(bundle.name, bundle.parameters, formats, arrays)

    def _store(
        self,
        bundles: Sequence[StoredBundle],
        hashes: Mapping[str, str],
        *,
        mapped: PackedFile | None,
        packed_now: bool,
        notices: tuple[str, ...],
    ) -> WeightStore:
        manifests = self._manifests()
        digest = _sha256_json(
            {
                "layout": self.layout.id,
                "parameters": [
                    [parameter.name, parameter.shape, manifests[self.formats[parameter.name]]]
                    for parameter in self.parameters
                ],
                "arrays": hashes,
            }
        )
        return WeightStore(
            layout=self.layout,
            bundles=bundles,
            digest=digest,
            mapped=mapped,
            from_cache=not packed_now,
            notices=notices,
        )

    def _manifests(self) -> dict[Format, dict[str, Any]]:
        return {chosen: chosen.to_manifest() for chosen in dict.fromkeys(self.formats.values())}

    def _format_names(self) -> str:
        """Of the weights that are worth packing, the one with most bytes first: "q4_1 + q8_0"."""
        sizes: Counter[str] = Counter()
        for parameter in self.parameters:
            if parameter.role != "vector":
                sizes[self.formats[parameter.name].name] += self._parameter_bytes(parameter)
        return " + ".join(name for name, _ in sizes.most_common())

    def _total_bytes(self) -> int:
        return sum(map(self._parameter_bytes, self.parameters))

    def _parameter_bytes(self, parameter: Parameter) -> int:
        rows, columns = parameter.shape if len(parameter.shape) == 2 else (1, parameter.shape[0])
        return self.formats[parameter.name].nbytes(rows, columns)

    def _report(self, stage: str, done_bytes: int, total_bytes: int | None) -> None:
        if self.progress is not None:
            self.progress(stage, done_bytes, total_bytes)


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def _array_name(bundle: str, array: str) -> str:
    assert "." not in array
    return f"{bundle}.{array}"


def _sha256_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

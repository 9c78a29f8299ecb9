"""LoRA adapters: the logits of merged weights, for the slots that have the adapter and no others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from octavo.errors import IncompatibleModelError
from octavo.quant.affine import INT8, Q4_1
from octavo.quant.format import Format
from octavo.quant.plain import Plain
from octavo.runners.base import Adapter, Batch, SlotState
from octavo.types import Sampling

TOKENS = 60


def random_adapter(made: Any, seed: int = 5, only: Sequence[str] = ()) -> Adapter:
    """Addends of mixed ranks for all linears, or those whose names end in `only`."""
    source = np.random.default_rng(seed)
    addends = {}
    for parameter in made.parameters:
        if parameter.role != "matrix" or (only and not parameter.name.endswith(tuple(only))):
            continue
        rows, columns = parameter.shape
        rank = int(source.integers(1, 10))
        a = source.normal(0, 1 / np.sqrt(columns), (rank, columns)).astype(np.float32)
        addends[parameter.name] = (a, source.normal(0, 0.5, (rows, rank)).astype(np.float32))
    assert addends
    return Adapter("d" * 64, addends)


def merged(made: Any, adapter: Adapter) -> Any:
    """The model with the adapter in its weights, in fp32."""
    tensors, formats = dict(made.tensors), dict(made.formats)
    for parameter in made.parameters:
        if parameter.role == "vector":
            continue
        chosen, tensor = made.formats[parameter.name], made.tensors[parameter.source]
        values = chosen.unpack(chosen.pack(tensor.values), parameter.shape[1])
        if parameter.name in adapter.addends:
            a, b = adapter.addends[parameter.name]
            values = values + b @ a
        tensors[parameter.source] = replace(tensor, values=values)
        formats[parameter.name] = Plain("f32")
    return replace(made, tensors=tensors, formats=formats)


def open_slot(driver: Any, slot: int, ids: Sequence[int], adapter: str | None) -> None:
    driver.runner.open_slot(slot, SlotState(ids, len(ids), Sampling(temperature=0.0), adapter))


def last_row(driver: Any, slot: int, ids: Sequence[int], size: int) -> np.ndarray:
    for start in range(0, len(ids), size):
        rows = driver.logits(driver.chunk(slot, start, ids[start : start + size]))
    return rows[0]


@pytest.mark.parametrize("format", [INT8, Plain("f32")], ids=lambda chosen: chosen.name)
@pytest.mark.parametrize(
    "name",
    ["plain", "tied", "biases", "not-gated", "qk-norm", "post-norms", "gelu", "multipliers", "odd-sizes"],
)
def test_against_merged_weights(
    isa: Any,
    name: str,
    format: Format,
    flags: Mapping[str, Any],
    tiny: Callable[..., Any],
    drive: Callable[..., Any],
    tokens: Callable[..., Any],
) -> None:
    spec = flags[name]
    made, ids = tiny(spec, format), tokens(TOKENS, vocabulary=spec.vocab_size)
    adapter = random_adapter(made)
    theirs, ours = drive(spec, merged(made, adapter).reference()), drive(spec, made.native(isa))
    ours.runner.load_adapter("fine", adapter)
    open_slot(ours, 0, ids, "fine")
    want = theirs.reference_logits(0, ids)
    got = np.concatenate([ours.logits(ours.chunk(0, i, [t])) for i, t in enumerate(ids)])
    assert np.abs(want - got).max() < 2e-2 * want.std()
    open_slot(ours, 1, ids, None)
    without = last_row(ours, 1, ids, TOKENS)
    assert np.abs(want[-1] - without).max() > 0.5 * want.std()


@pytest.mark.parametrize(
    "linear", ["mixer.k.weight", "mixer.o.weight", "ffn.gate.weight", "down.weight", "head.weight"]
)
def test_a_single_linear(
    isa: Any,
    linear: str,
    models: Any,
    tiny: Callable[..., Any],
    drive: Callable[..., Any],
    tokens: Callable[..., Any],
) -> None:
    spec = models(72, 88)
    made, ids = tiny(spec), tokens(TOKENS)
    adapter = random_adapter(made, only=(linear,))
    theirs, ours = drive(spec, merged(made, adapter).reference()), drive(spec, made.native(isa))
    ours.runner.load_adapter("fine", adapter)
    open_slot(ours, 0, ids, "fine")
    want, got = theirs.reference_logits(0, ids)[-1], last_row(ours, 0, ids, TOKENS)
    assert np.abs(want - got).max() < 2e-2 * want.std()


@pytest.mark.parametrize("format", [INT8, Q4_1], ids=lambda chosen: chosen.name)
def test_bits_in_mixed_batches(
    isa: Any,
    format: Format,
    models: Any,
    tiny: Callable[..., Any],
    drive: Callable[..., Any],
    tokens: Callable[..., Any],
) -> None:
    """With two adapters, and none, in a batch, every sequence has the bits it has alone: also the one that has
    no adapter, against a runner that never saw any."""
    spec = models(96, 160)
    made = tiny(spec, format)
    adapters = {"a": random_adapter(made, 1), "b": random_adapter(made, 2, ("q.weight", "up.weight"))}
    names = ("a", None, "b", "a")
    prompts = [tokens(n, seed=n) for n in (3, 70, 37, 55)]
    alone = []
    for slot, (name, ids) in enumerate(zip(names, prompts, strict=True)):
        driver = drive(spec, made.native(isa))
        if name is not None:
            driver.runner.load_adapter(name, adapters[name])
        open_slot(driver, slot, ids, name)
        first = last_row(driver, slot, ids[:-1], 1)
        alone.append((first, driver.logits(driver.chunk(slot, len(ids) - 1, None))[0]))
    for threads, chunk in ((1, 512), (2, 64), (5, 7)):
        driver = drive(spec, made.native(isa, threads=threads, chunk=chunk))
        for name, adapter in adapters.items():
            driver.runner.load_adapter(name, adapter)
        for slot, (name, ids) in enumerate(zip(names, prompts, strict=True)):
            open_slot(driver, slot, ids, name)
        part = driver.logits(*(driver.chunk(slot, 0, ids[:-1]) for slot, ids in enumerate(prompts)))
        whole = driver.logits(*(driver.chunk(slot, len(ids) - 1, None) for slot, ids in enumerate(prompts)))
        for slot, (first, second) in enumerate(alone):
            assert part[slot].tobytes() == first.tobytes(), (threads, slot)
            assert whole[slot].tobytes() == second.tobytes(), (threads, slot)


def test_prompt_logprobs_have_the_adapter(
    isa: Any, models: Any, tiny: Callable[..., Any], drive: Callable[..., Any], tokens: Callable[..., Any]
) -> None:
    spec = models(72, 88)
    made, ids = tiny(spec), tokens(TOKENS)
    adapter = random_adapter(made, only=("head.weight",))
    theirs, ours = drive(spec, merged(made, adapter).reference()), drive(spec, made.native(isa, chunk=40))
    ours.runner.load_adapter("fine", adapter)
    open_slot(ours, 0, ids, "fine")
    open_slot(ours, 1, ids, None)
    batch = Batch(tuple(ours.chunk(slot, 0, ids, targets=(*ids[1:], -1)) for slot in (1, 0)))
    plain, adapted = ours.runner.forward(batch).result().prompt_logprobs
    rows = theirs.reference_logits(0, ids)[:-1].astype(np.float64)
    want = rows[np.arange(TOKENS - 1), ids[1:]] - np.log(np.exp(rows).sum(-1))
    np.testing.assert_allclose([x.logprob for x in adapted], want, atol=0.05)
    assert np.abs(np.array([x.logprob for x in plain]) - want).max() > 0.5


def test_what_does_not_fit_is_refused(
    isa: Any, models: Any, tiny: Callable[..., Any], drive: Callable[..., Any]
) -> None:
    spec = models(72, 88)
    made = tiny(spec)
    runner = drive(spec, made.native(isa)).runner
    a, b = np.ones((2, 72), np.float32), np.ones((96, 2), np.float32)
    bad = {
        "no addend": {"embedding.weight": (a, b)},
        "which is 96 x 72": {"layers.0.mixer.q.weight": (a[:, :70], b)},
        "2\\) times": {"layers.0.mixer.q.weight": (a, b[:80])},
        "not finite": {"layers.0.mixer.q.weight": (a * np.nan, b)},
    }
    for message, addends in bad.items():
        with pytest.raises(IncompatibleModelError, match=message):
            runner.load_adapter("bad", Adapter("0" * 64, addends))
    runner.load_adapter("good", Adapter("0" * 64, {"layers.0.mixer.q.weight": (a, b)}))
    assert runner.memory()["adapters"] == a.nbytes + b.nbytes
    runner.open_slot(0, SlotState((1, 2), 2, Sampling(), "good"))
    with pytest.raises(AssertionError, match="in use"):
        runner.drop_adapter("good")


@pytest.mark.parametrize("name", ["plain", "tied", "biases", "not-gated", "parallel", "odd-sizes"])
def test_the_reference_takes_adapters_too(
    name: str,
    flags: Mapping[str, Any],
    tiny: Callable[..., Any],
    drive: Callable[..., Any],
    tokens: Callable[..., Any],
) -> None:
    spec = flags[name]
    made, ids = tiny(spec), tokens(TOKENS, vocabulary=spec.vocab_size)
    adapter = random_adapter(made)
    theirs, ours = drive(spec, merged(made, adapter).reference()), drive(spec, made.reference())
    ours.runner.load_adapter("fine", adapter)
    open_slot(ours, 0, ids, "fine")
    open_slot(ours, 1, ids, None)
    ours.runner.forward(Batch((ours.chunk(0, 0, ids), ours.chunk(1, 0, ids))))
    want = theirs.reference_logits(0, ids)[-1]
    np.testing.assert_allclose(ours.runner.logits(0), want, atol=1e-3 * want.std())
    never = drive(spec, made.reference())
    open_slot(never, 1, ids, None)
    never.runner.forward(Batch((never.chunk(1, 0, ids),)))
    plain = never.runner.logits(1)
    assert ours.runner.logits(1).tobytes() == plain.tobytes()
    with pytest.raises(IncompatibleModelError, match="no addend"):
        ours.runner.load_adapter("bad", Adapter("0" * 64, {"layers.9.ffn.up.weight": (plain, plain)}))

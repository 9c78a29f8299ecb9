"""The planner: bytes worked out by hand, laws on random models, and refusals whose remedies hold.

Runners and formats are small fakes, so that every number here can be checked on paper.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import hypothesis
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from octavo.devices import DeviceChoice, Gpu, Machine, Unusable
from octavo.errors import DeviceError, IncompatibleModelError, InvalidParameterError, NotEnoughMemoryError
from octavo.load_plan import TIGHT_SHARE, LoadPlan
from octavo.models.parameters import Parameter
from octavo.models.spec import Attention, DenseMLP, KVGroup, LayerNorms, LayerSpec, ModelSpec, Norm
from octavo.plan import (
    GRAMMAR_ENTRY_BYTES,
    GRAMMAR_LIBRARY_BYTES,
    RESERVE_SHARE,
    VOCABULARY_ENTRY_BYTES,
    kv_group_pages,
    make_plan,
)
from octavo.quant.format import Format
from octavo.runners.base import RunnerConfig
from octavo.runners.reference.kind import ReferenceKind
from octavo.settings import Settings
from octavo.units import readable_bytes

NONE = Unusable("it was not asked for", "Ask.")
ROOMY = 1 << 50


PROCESS_BYTES, CUDA_PROCESS_BYTES = 160 << 20, 448 << 20


@dataclass(frozen=True)
class FakeFormat:
    """`bits` a weight."""

    name: str
    bits: int

    def nbytes(self, rows: int, columns: int) -> int:
        return rows * columns * self.bits // 8

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a plan has no business with {name}")


@dataclass(frozen=True)
class FakeLayout:
    id: str = "fake-1"


@dataclass(frozen=True)
class FakeKind:
    """Holds a copy of the weights in the compute dtype, as the reference does, or none at all."""

    name: str = "reference"
    copies: bool = True
    why_not: str | None = None
    layout: FakeLayout = FakeLayout()

    def declines(self, spec: ModelSpec, formats: Sequence[Format], config: RunnerConfig) -> str | None:
        if config.kv_dtype == "int8" and self.name != "cuda":
            return "it keeps no int8"
        return self.why_not

    def weight_bytes(self, parameter: Parameter, format: Format, config: RunnerConfig) -> int:
        item_bytes = 4 if config.compute_dtype == "float32" or parameter.role == "vector" else 2
        return elements(parameter) * item_bytes if self.copies else 0

    def process_bytes(self, config: RunnerConfig) -> int:
        return CUDA_PROCESS_BYTES if config.device.startswith("cuda") else PROCESS_BYTES

    def activation_bytes(self, spec: ModelSpec, config: RunnerConfig) -> int:
        return 1000 * config.prefill_chunk_tokens + 10 * config.context_tokens + 4 * spec.vocab_size


def elements(parameter: Parameter) -> int:
    rows, columns = ([1, *parameter.shape])[-2:]
    return rows * columns


def llama_spec(
    *,
    vocab: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    inter: int,
    windows: Sequence[int | None],
    context: int,
    family: str = "llama",
) -> ModelSpec:
    norm = Norm("rms", 1e-5)

    def layer(window: int | None) -> LayerSpec:
        mixer = Attention(heads, kv_heads, head_dim, scale=1.0, rope=None, window=window)
        return LayerSpec(LayerNorms(norm, None, norm, None), mixer, DenseMLP(inter, "silu"))

    layers = tuple(layer(window) for window in windows)
    return ModelSpec(family, vocab, hidden, layers, norm, context, tied_head=True)


def list_parameters(spec: ModelSpec) -> tuple[Parameter, ...]:
    """q, k and v come from one fused source tensor, to see its bytes shared out."""
    found = [Parameter("embedding.weight", (spec.vocab_size, spec.hidden_size), "embedding", "embed")]
    for i, layer in enumerate(spec.layers):
        mixer, inter, hidden = layer.mixer, layer.ffn.hidden_size, spec.hidden_size
        wide, narrow = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
        shapes = {
            "mixer.q": (wide, hidden),
            "mixer.k": (narrow, hidden),
            "mixer.v": (narrow, hidden),
            "mixer.o": (hidden, wide),
            "ffn.gate": (inter, hidden),
            "ffn.up": (inter, hidden),
            "ffn.down": (hidden, inter),
        }
        for name, shape in shapes.items():
            source = f"{i}.qkv" if name in ("mixer.q", "mixer.k", "mixer.v") else f"{i}.{name}"
            found.append(Parameter(f"layers.{i}.{name}.weight", shape, "matrix", source))
        for name in ("pre_mixer", "pre_ffn"):
            found.append(Parameter(f"layers.{i}.norms.{name}.weight", (hidden,), "vector", f"{i}.{name}"))
    found.append(Parameter("final_norm.weight", (spec.hidden_size,), "vector", "norm"))
    return tuple(found)


F32, BF16, EIGHT, FOUR = (
    FakeFormat("f32", 32),
    FakeFormat("bf16", 16),
    FakeFormat("int8", 8),
    FakeFormat("q4", 4),
)


def all_in(parameters: Sequence[Parameter], weights: FakeFormat) -> dict[str, FakeFormat]:
    return {each.name: F32 if each.role == "vector" else weights for each in parameters}


def host(available_bytes: int, **changes: Any) -> Machine:
    facts: dict[str, Any] = {"total_bytes": available_bytes, "available_bytes": available_bytes}
    return Machine(**(facts | {"cores": 4, "cpus": 8, "cuda": NONE, "mps": NONE} | changes))


CPU = DeviceChoice("cpu", "as asked")


def plan(spec: ModelSpec, *, available: int = ROOMY, weights: FakeFormat = EIGHT, **changes: Any) -> LoadPlan:
    parameters = list_parameters(spec)
    sources: dict[str, int] = {}
    for each in parameters:  # a bf16 checkpoint
        sources[each.source] = sources.get(each.source, 0) + 2 * elements(each)
    said: dict[str, Any] = {
        "settings": Settings(),
        "spec": spec,
        "parameters": parameters,
        "formats": all_in(parameters, weights),
        "file_bytes": sources,
        "kinds": (FakeKind(),),
        "machine": host(available),
        "device": CPU,
    }
    return make_plan(**(said | changes))


SMOLLM2 = llama_spec(
    vocab=49152, hidden=576, heads=9, kv_heads=3, head_dim=64, inter=1536, windows=[None] * 30, context=8192
)
GEMMA2 = llama_spec(
    vocab=256000,
    hidden=2304,
    heads=8,
    kv_heads=4,
    head_dim=256,
    inter=9216,
    windows=[4096, None] * 13,
    context=8192,
    family="gemma2",
)


KV_HEAVY = dataclasses.replace(
    llama_spec(
        vocab=1000,
        hidden=64,
        heads=8,
        kv_heads=8,
        head_dim=256,
        inter=128,
        windows=[1024, None],
        context=8192,
    ),
    family="gemma2",
)


def grammars(vocabulary: int) -> int:
    return GRAMMAR_LIBRARY_BYTES + GRAMMAR_ENTRY_BYTES * vocabulary


# --- by hand ---------------------------------------------------------------------------------------


def test_smollm2_on_the_reference_runner() -> None:
    found = plan(SMOLLM2)
    vectors = 61 * 576
    matrices = 134_515_008 - vectors  # the parameter count of SmolLM2-135M
    assert found.config == RunnerConfig(
        device="cpu",
        compute_dtype="float32",
        kv_dtype="float32",
        context_tokens=8192,
        max_slots=8,
        kv_pages=(256,),
        prefill_chunk_tokens=512,
        threads=4,
        draft_rows=16,
    )
    assert found.packed_bytes == matrices + 4 * vectors
    assert found.file_bytes == 2 * 134_515_008
    assert [(w.format, w.tensors, w.packed_bytes) for w in found.weights] == [
        ("int8", 211, matrices),
        ("f32", 61, 4 * vectors),
    ]
    kv = 8192 * 30 * 2 * 3 * 64 * 4
    assert kv == 377_487_360
    process = PROCESS_BYTES + 49152 * VOCABULARY_ENTRY_BYTES
    (pool,) = found.pools
    assert dict(pool.parts) == {
        "process": process,
        "grammars": grammars(49152),
        "weights": 4 * 134_515_008,
        "kv": kv,
        "activations": 512_000 + 81_920 + 196_608,
    }
    largest = 4 * 49152 * 576
    assert pool.load_peak_bytes == process + found.packed_bytes + largest + 4 * 134_515_008


def test_gemma2_on_a_gpu_pages_its_windows_apart() -> None:
    card = Gpu("A100", (8, 0), 40 << 30, 39 << 30)
    found = plan(
        GEMMA2,
        machine=host(ROOMY, cuda=(card,)),
        device=DeviceChoice("cuda:0", "auto found A100"),
        kinds=(FakeKind("cuda"),),
    )
    assert (found.dtypes.compute, found.dtypes.kv) == ("bfloat16", "bfloat16")
    layer_page = 32 * 2 * 4 * 256 * 2
    # Windows: (4096 + 512) / 32 pages and one more, because a window may begin inside a page.
    assert [(k.window, k.layers, k.pages, k.nbytes) for k in found.kv] == [
        (None, 13, 256, 256 * 13 * layer_page),
        (4096, 13, 145, 145 * 13 * layer_page),
    ]
    on_card, on_host = found.pools
    assert (on_card.name, on_host.name) == ("cuda:0", "host")
    assert on_card.available_bytes == 39 << 30
    assert on_card.parts["kv"] == (256 + 145) * 13 * layer_page
    assert on_card.load_peak_bytes == on_card.parts["weights"]
    process = CUDA_PROCESS_BYTES + 256000 * VOCABULARY_ENTRY_BYTES
    assert dict(on_host.parts) == {"process": process, "grammars": grammars(256000)}
    assert on_host.load_peak_bytes == on_host.parts["process"] + found.packed_bytes + 4 * 256000 * 2304
    assert found.config.threads is None


def test_int8_keys_and_values_take_half_and_a_scale() -> None:
    card = Gpu("A100", (8, 0), 40 << 30, 39 << 30)
    where = DeviceChoice("cuda:0", "auto found A100")
    found = plan(
        GEMMA2,
        machine=host(ROOMY, cuda=(card,)),
        device=where,
        kinds=(FakeKind("cuda"),),
        settings=Settings(kv_dtype="int8"),
    )
    assert found.config.kv_dtype == found.dtypes.kv == "int8"
    layer_page = 32 * 2 * 4 * (256 + 4)
    assert [k.nbytes for k in found.kv] == [256 * 13 * layer_page, 145 * 13 * layer_page]
    assert "KV cache in int8 (as asked)" in " ".join(found.reasons)


def test_int8_keys_and_values_are_refused_by_name_where_no_runner_has_them() -> None:
    with pytest.raises(IncompatibleModelError, match="it keeps no int8") as caught:
        plan(SMOLLM2, settings=Settings(kv_dtype="int8"))
    assert "--kv-dtype" in caught.value.remedy
    reference = ReferenceKind()
    config = dataclasses.replace(plan(SMOLLM2).config, kv_dtype="int8")
    assert "not in int8" in (reference.declines(SMOLLM2, [], config) or "")


def test_int8_keys_and_values_are_offered_where_they_would_fit() -> None:
    card = Gpu("A100", (8, 0), 40 << 30, 39 << 30)
    kinds = (FakeKind("cuda"),)

    def on(free: int, **said: Any) -> LoadPlan:
        machine = host(ROOMY, cuda=(dataclasses.replace(card, available_bytes=free),))
        return plan(
            KV_HEAVY,
            machine=machine,
            device=DeviceChoice("cuda:0", "asked"),
            kinds=kinds,
            settings=Settings(context=4096, **said),
        )

    (pool, _) = on(39 << 30, kv_dtype="int8").pools
    free = int((pool.needed_bytes + 1) / (1 - RESERVE_SHARE))
    with pytest.raises(NotEnoughMemoryError) as caught:
        on(free)
    assert "--kv-dtype int8" in caught.value.remedy
    assert on(free, kv_dtype="int8").context.tokens == 4096


def test_a_runner_without_copies_needs_its_packed_weights_mapped() -> None:
    found = plan(SMOLLM2, kinds=(FakeKind("cpu", copies=False),))
    (pool,) = found.pools
    assert pool.parts["packed weights"] == found.packed_bytes
    assert "weights" not in pool.parts
    assert found.dtypes.kv == "float16"
    assert pool.parts["kv"] == 377_487_360 // 2


def test_sequences_asked_for_have_their_own_pages_where_they_fit() -> None:
    one, three = plan(GEMMA2), plan(GEMMA2, settings=Settings(max_sequences=3))
    assert three.config.kv_pages == tuple(3 * pages for pages in one.config.kv_pages)
    assert (three.config.max_slots, three.kv_contexts) == (3, 3.0)
    assert "each with the KV memory of a full context" in " ".join(three.reasons)


def test_sequences_nobody_asked_for_share_the_pages_of_one() -> None:
    found, alone = plan(GEMMA2), plan(GEMMA2, settings=Settings(max_sequences=1))
    assert (found.config.max_slots, alone.config.max_slots) == (8, 1)
    assert found.config.kv_pages == alone.config.kv_pages
    assert found.kv_contexts == 1.0
    assert "up to 8 together, sharing the KV memory of one full context" in " ".join(found.reasons)
    assert "one at a time" in " ".join(alone.reasons)


@pytest.mark.parametrize("spec", [KV_HEAVY, GEMMA2], ids=["kv heavy", "gemma2"])
@pytest.mark.parametrize("held", [1.0, 1.3, 2.5, 3.9])
def test_kv_memory_is_what_is_free_once_one_context_fits(spec: ModelSpec, held: float) -> None:
    """Between one full context and one for each sequence, and never so much that memory gets tight."""
    settings = Settings(max_sequences=4)
    all_of_it = plan(spec, settings=settings).pools[0]
    one = plan(spec, settings=Settings(max_sequences=1)).pools[0].parts["kv"]
    assert all_of_it.parts["kv"] >= 4 * one
    less = int((4 - held) * one)
    needed = max(all_of_it.load_peak_bytes, all_of_it.running_bytes - less)
    found = plan(spec, settings=settings, available=int(needed / (1 - TIGHT_SHARE)))
    (pool,) = found.pools
    if needed == all_of_it.load_peak_bytes:
        pytest.skip("the load's peak is above all of it")
    assert found.kv_contexts == pytest.approx(held, abs=0.02)
    assert found.config.max_slots == 4
    assert pool.parts["kv"] == pytest.approx(held * one, rel=0.02)
    assert pool.fits
    if held > 1:
        assert not pool.tight
        assert f"{found.kv_contexts:.1f} full contexts, which is what fits" in " ".join(found.reasons)


def test_a_tight_plan_warns_with_both_numbers() -> None:
    needed = plan(SMOLLM2).pools[0].needed_bytes
    roomy = plan(SMOLLM2, available=int(needed / (1 - TIGHT_SHARE)) + 1)
    assert roomy.warnings == ()
    tight = plan(SMOLLM2, available=int(needed / (1 - TIGHT_SHARE)) - 1000)
    (warning,) = tight.warnings
    assert readable_bytes(needed) in warning
    assert "--context" in warning
    assert tight.to_json()["warnings"] == [warning]


# --- the context -----------------------------------------------------------------------------------


def with_context(spec: ModelSpec, tokens: int) -> ModelSpec:
    return dataclasses.replace(spec, max_context_tokens=tokens)


def test_the_default_context_is_the_least_of_three() -> None:
    assert plan(with_context(SMOLLM2, 2000)).context.tokens == 2000
    assert plan(with_context(SMOLLM2, 131072)).context.tokens == 8192
    assert plan(with_context(SMOLLM2, 131072)).context.fits_tokens == 131072
    # Room for the load's peak, and for most of the 8,192 tokens' keys and values.
    (pool,) = plan(SMOLLM2).pools
    some = int((pool.running_bytes - 100_000_000) / (1 - RESERVE_SHARE))
    short = plan(SMOLLM2, available=some)
    assert 512 < short.context.tokens < 8192
    assert short.context.tokens % 32 == 0
    assert short.context.tokens == short.context.fits_tokens
    assert f"{short.context.tokens:,} of the model's" in short.context.reason
    assert "all that fits" in short.context.reason
    with pytest.raises(NotEnoughMemoryError):
        plan(SMOLLM2, available=some, settings=Settings(context=short.context.tokens + 32))


def test_a_context_beyond_the_models_is_refused_with_both_numbers() -> None:
    with pytest.raises(InvalidParameterError, match=r"8193.*8192") as caught:
        plan(SMOLLM2, settings=Settings(context=8193))
    assert caught.value.parameter == "context"
    assert "--context 8192" in caught.value.remedy
    assert plan(SMOLLM2, settings=Settings(context=8192)).context.tokens == 8192


def test_a_context_asked_for_is_kept_to_the_token() -> None:
    found = plan(SMOLLM2, settings=Settings(context=100))
    assert found.config.context_tokens == 100
    assert found.config.prefill_chunk_tokens == 100
    assert found.config.kv_pages == (4,)


def test_short_prompts_of_many_sequences_begin_in_one_step() -> None:
    found = plan(SMOLLM2, settings=Settings(context=48, max_sequences=8))
    assert found.config.prefill_chunk_tokens == 8 * 48
    assert found.config.kv_pages == (16,)
    assert plan(SMOLLM2, settings=Settings(context=48, max_sequences=32)).config.prefill_chunk_tokens == 512


def test_a_context_that_fits_is_taken_even_where_its_last_page_would_not_fill() -> None:
    wanted = Settings(context=100)
    available = int((plan(KV_HEAVY, settings=wanted).pools[0].needed_bytes + 1) / (1 - RESERVE_SHARE))
    found = plan(KV_HEAVY, available=available, settings=wanted)
    assert (found.context.tokens, found.context.fits_tokens) == (100, 100)
    with pytest.raises(NotEnoughMemoryError):
        plan(KV_HEAVY, available=available, settings=Settings(context=128))


# --- refusals --------------------------------------------------------------------------------------


def test_a_load_that_cannot_fit_is_refused_with_both_numbers() -> None:
    with pytest.raises(NotEnoughMemoryError) as caught:
        plan(SMOLLM2, available=500 << 20)
    error = caught.value
    assert error.exit_code == 4
    assert error.available_bytes == int((500 << 20) * (1 - RESERVE_SHARE))
    assert error.needed_bytes == plan(SMOLLM2, settings=Settings(context=512)).pools[0].load_peak_bytes
    assert readable_bytes(error.needed_bytes) in error.message
    assert readable_bytes(error.available_bytes) in error.message
    assert "while packing" in error.message
    assert error.remedy == "Free memory, or choose a smaller model."


def test_a_refusal_names_the_quant_that_would_fit() -> None:
    native = (FakeKind("cpu", copies=False),)
    parameters = list_parameters(SMOLLM2)
    settings = Settings(context=4096)
    whole = plan(SMOLLM2, settings=settings, kinds=native, weights=EIGHT).pools[0].needed_bytes
    with pytest.raises(NotEnoughMemoryError) as caught:
        plan(
            SMOLLM2,
            settings=settings,
            kinds=native,
            weights=BF16,
            available=int((whole + (1 << 20)) / (1 - RESERVE_SHARE)),
            alternatives={"int8": all_in(parameters, EIGHT), "none": all_in(parameters, BF16)},
        )
    assert re.fullmatch(r"Try --quant int8\.", caught.value.remedy), caught.value.remedy


def test_the_default_context_is_not_shrunk_to_nothing_unasked() -> None:
    small = plan(KV_HEAVY, settings=Settings(context=256))
    available = int((small.pools[0].needed_bytes + 1) / (1 - RESERVE_SHARE))
    with pytest.raises(NotEnoughMemoryError, match="even a context of 512 tokens") as caught:
        plan(KV_HEAVY, available=available)
    assert caught.value.remedy == "Try --context 256."
    assert "kv" in caught.value.message
    found = plan(KV_HEAVY, available=available, settings=Settings(context=256))
    assert (found.context.tokens, found.context.fits_tokens) == (256, 256)


@hypothesis.settings(deadline=None)
@given(st.integers(150 << 20, 900 << 20), st.one_of(st.none(), st.integers(1, 8192)), st.integers(1, 4))
def test_a_suggested_context_fits_and_no_larger_one_does(
    available: int, context: int | None, sequences: int
) -> None:
    settings = Settings(context=context, max_sequences=sequences)
    refusal: NotEnoughMemoryError | None = None
    try:
        found = plan(KV_HEAVY, available=available, settings=settings)
    except NotEnoughMemoryError as error:
        refusal = error
    if refusal is None:
        assert all(pool.fits for pool in found.pools)
        assert found.context.fits_tokens >= found.context.tokens
        return
    assert refusal.needed_bytes > refusal.available_bytes

    def fits(**changes: int) -> bool:
        asked = dataclasses.replace(settings, **changes)
        try:
            return plan(KV_HEAVY, available=available, settings=asked).pools[0].fits
        except NotEnoughMemoryError:
            return False

    for number in re.findall(r"--context (\d+)", refusal.remedy):
        assert fits(context=int(number))
        assert not fits(context=int(number) + 32)
    if "--max-sequences 1" in refusal.remedy:
        assert fits(max_sequences=1, context=context or 512)


def test_the_first_runner_that_takes_the_model_is_taken_and_the_others_are_named() -> None:
    picky = FakeKind("cuda", why_not="needs a GPU")
    found = plan(SMOLLM2, kinds=(picky, FakeKind("cpu", copies=False), FakeKind()))
    assert found.runner == "cpu"
    assert [(each.runner, each.reason) for each in found.declined] == [("cuda", "needs a GPU")]
    assert "runner cuda declined: needs a GPU" in found.reasons
    with pytest.raises(IncompatibleModelError, match="cuda: needs a GPU"):
        plan(SMOLLM2, kinds=(picky,))


def test_contradicting_dtypes_are_refused_before_any_runner_is_asked() -> None:
    with pytest.raises(InvalidParameterError, match="gemma2"):
        plan(GEMMA2, settings=Settings(dtype="float16"))


# --- laws ------------------------------------------------------------------------------------------

specs = st.builds(
    llama_spec,
    vocab=st.integers(1, 5000),
    hidden=st.integers(1, 64),
    heads=st.integers(1, 4),
    kv_heads=st.integers(1, 4),
    head_dim=st.integers(1, 64),
    inter=st.integers(1, 64),
    windows=st.lists(st.sampled_from([None, 1, 31, 512, 5000]), min_size=1, max_size=6),
    context=st.integers(1, 40_000),
)
kinds = st.sampled_from([FakeKind(), FakeKind("cpu", copies=False)])
formats = st.sampled_from([BF16, EIGHT, FOUR])


@hypothesis.settings(deadline=None)
@given(specs, kinds, formats, st.data())
def test_bytes_add_up_and_grow_with_the_context(
    spec: ModelSpec, kind: FakeKind, weights: FakeFormat, data: st.DataObject
) -> None:
    lengths = st.integers(1, spec.max_context_tokens)
    less, more = sorted((data.draw(lengths), data.draw(lengths)))
    plans = [plan(spec, weights=weights, kinds=(kind,), settings=Settings(context=c)) for c in (less, more)]
    for found in plans:
        (pool,) = found.pools
        assert pool.running_bytes == sum(pool.parts.values())
        assert pool.parts["kv"] == sum(group.nbytes for group in found.kv)
        assert found.packed_bytes == sum(w.packed_bytes for w in found.weights)
        assert found.file_bytes == sum(2 * elements(p) for p in list_parameters(spec))
        assert sum(w.tensors for w in found.weights) == len(found.formats)
        assert found.config.kv_pages == tuple(group.pages for group in found.kv)
        assert sum(group.layers for group in found.kv) == len(spec.layers)
        assert found.context.fits_tokens == spec.max_context_tokens
    (small,), (large,) = (found.pools for found in plans)
    assert small.running_bytes <= large.running_bytes
    assert small.load_peak_bytes == large.load_peak_bytes


@hypothesis.settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 20_000), st.integers(1, 600), st.integers(0, 20_000))
def test_a_window_group_never_runs_out_of_pages(window: int, context: int, chunk: int, start: int) -> None:
    """A chunk at any start looks back window - 1 tokens and writes its own."""
    chunk = min(chunk, context)
    assume(start + chunk <= context)
    first, last = max(0, start - window + 1), start + chunk - 1
    touched = last // 32 - first // 32 + 1
    group = KVGroup(window, (0,))
    pages = kv_group_pages(group, context_tokens=context, prefill_chunk_tokens=chunk, contexts=Fraction(1))
    assert touched <= pages <= -(-context // 32)


@hypothesis.settings(deadline=None)
@given(specs)
def test_a_plan_is_json(spec: ModelSpec) -> None:
    said = json.loads(json.dumps(plan(spec).to_json()))
    assert said["context"]["tokens"] <= spec.max_context_tokens
    assert said["memory"][0]["running_bytes"] == sum(said["memory"][0]["parts"].values())


def test_planning_imports_no_torch() -> None:
    code = "import sys, octavo.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 bytes"), (12 << 10, "12 KiB"), (538 << 20, "538 MiB"), (3 << 29, "1.5 GiB")]
)
def test_readable_bytes(count: int, words: str) -> None:
    assert readable_bytes(count) == words


# --- what was asked for and is not there -----------------------------------------------------------


def test_more_threads_than_cpus_are_refused_with_their_number() -> None:
    assert plan(SMOLLM2, settings=Settings(threads=8)).config.threads == 8
    with pytest.raises(InvalidParameterError, match="--threads 9 is more than the 8 CPUs") as caught:
        plan(SMOLLM2, settings=Settings(threads=9))
    assert caught.value.parameter == "threads"


def test_a_runner_or_isa_that_was_asked_for_is_named_in_the_remedy() -> None:
    kinds = (FakeKind("cpu", why_not="it has no such layer"),)
    with pytest.raises(IncompatibleModelError) as caught:
        plan(SMOLLM2, kinds=kinds, settings=Settings(runner="cpu", isa="avx2"))
    assert "--runner and --isa" in caught.value.remedy
    with pytest.raises(IncompatibleModelError) as caught:
        plan(SMOLLM2, kinds=kinds)
    assert "--device" in caught.value.remedy


def test_the_cuda_runner_without_cuda_is_a_device_error() -> None:
    kinds = (FakeKind("cuda", why_not="it runs on CUDA devices"),)
    with pytest.raises(DeviceError, match=NONE.why):
        plan(SMOLLM2, kinds=kinds, settings=Settings(runner="cuda"))

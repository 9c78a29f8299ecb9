"""A runner that computes a toy model through its pages, and notes every breach of the Runner contract.

Its next-token logits are a hash of the history as read back *through the page tables*: a wrong page, a page
given away too early, a wrong position or a mixed-up row changes the tokens. `expected_tokens` computes the
same from the plain token list. It can run at once, when asked for a result, at random, or on a thread.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest

from octavo.engine.engine import Engine
from octavo.engine.sampling import TokenCounts, has_penalties, sample_token, token_logprob
from octavo.errors import NumericalError
from octavo.models.spec import Attention, DenseMLP, LayerNorms, LayerSpec, ModelSpec, Norm
from octavo.runners.base import Counters, ForwardResult, RunnerConfig, RunnerInfo, Sampled, SampleResult
from octavo.runners.masks import unpack_mask
from octavo.types import Request, Sampling

VOCAB = 61
PAGE = 32
POSITIONS = 4096

_POWERS = np.ones(POSITIONS, dtype=np.uint64)
_POWERS[1:] = np.uint64(0x9E3779B97F4A7C15)
_POWERS = np.cumprod(_POWERS)
_VOCABULARY = np.arange(1, VOCAB + 1, dtype=np.uint64) * np.uint64(0xBF58476D1CE4E5B9)


def logits_of(digests) -> np.ndarray:
    """One uint64 digest for each KV group -> fp32 [VOCAB] in [-4, 4)."""
    mixed = 0
    for digest in digests:
        mixed = (mixed ^ digest) * 0x94D049BB133111EB % 2**64
    words = _VOCABULARY + np.uint64(mixed)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-21) - np.float32(4)).astype(
        np.float32
    )


def digests(values: np.ndarray, first: int, end: int, window: int | None) -> list[int]:
    """History digests of the queries at positions [first, end); values[i] is the token at position i, + 1."""
    terms = values[:end] * _POWERS[:end]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms)])
    positions = np.arange(first, end)
    seen_from = 0 if window is None else np.maximum(positions - window + 1, 0)
    return (sums[positions + 1] - sums[seen_from]).tolist()


def make_spec(windows=(None,)) -> ModelSpec:
    norm = Norm("rms", 1e-5)
    layers = tuple(
        LayerSpec(
            LayerNorms(norm, None, norm, None),
            Attention(heads=1, kv_heads=1, head_dim=2, scale=1.0, rope=None, window=window),
            DenseMLP(4, "silu"),
        )
        for window in windows
    )
    return ModelSpec("toy", VOCAB, 2, layers, norm, POSITIONS, tied_head=True)


POISON = np.uint64(2**63)
"""What a number that is not finite leaves in a page: every later row that sees it is not finite either."""


def offset_of(adapter: str | None) -> int:
    """What an adapter's content adds to every value in the pages."""
    return 0 if adapter is None else 1000 * (1 + sum(adapter.encode()))


def expected_tokens(spec: ModelSpec, request: Request, constraint=None, adapter=None) -> list[int]:
    """What the toy model generates, from the plain history; `adapter`: its digest."""
    tokens = list(request.prompt_token_ids)
    windows = [group.window for group in spec.kv_groups]
    while len(tokens) < len(request.prompt_token_ids) + request.max_new_tokens:
        values = np.array(tokens, dtype=np.uint64) + np.uint64(1 + offset_of(adapter))
        end = len(tokens)
        logits = logits_of([digests(values, end - 1, end, window)[0] for window in windows])
        counts = None
        if has_penalties(request.sampling):
            counts = TokenCounts.of(tokens, len(request.prompt_token_ids), VOCAB)
        for process in request.logits_processors:
            logits = process(tokens, logits)
        mask = None if constraint is None else constraint.mask()
        allowed = None if mask is None else unpack_mask(mask, VOCAB)
        tokens.append(sample_token(logits, request.sampling, end, counts, allowed))
        if tokens[-1] in request.stop_token_ids:
            break
        if constraint is not None:
            constraint.accept(tokens[-1])
            if constraint.finished:
                break
    return tokens[len(request.prompt_token_ids) :]


class FakeHandle:
    def __init__(self, runner, work):
        self._runner, self._work = runner, work
        self.value = self.error = None
        self.finished = threading.Event()

    def run(self):
        try:
            self.value = self._work()
        except Exception as error:
            self.error = error
        self.finished.set()

    def done(self):
        if self._runner.mode == "random" and self._runner.random.random() < 0.5:
            self._runner.run_until(self)
        return self.finished.is_set()

    def result(self):
        self._runner.run_until(self)
        if self.error is not None:
            raise self.error
        return self.value


class FakeRunner:
    """`mode`: "sync" computes before it returns; "lazy" when a result is asked for (a device that is always
    behind); "random" either; "thread" on a worker with random delays.

    `faults`: (sampling seed, position of the token to sample) -> "nan" (its row), "nan kv" (what that row leaves
    in the pages, and so every row from it on), "nan prompt", or an exception that the forward pass raises for
    the whole batch; `once` faults are forgotten when they struck.
    """

    def __init__(self, spec, config, mode="sync", seed=0):
        self.mode, self.random = mode, random.Random(seed)
        self.windows = [group.window for group in spec.kv_groups]
        self.info = RunnerInfo(
            "fake", "cpu", "ref-1", "float32", "float32", config.max_slots, config.kv_pages, {}, True, True
        )
        self.config = config
        self.pages = [np.full((count, PAGE), 10**9, dtype=np.uint64) for count in config.kv_pages]
        self.slots = {}
        self.queue = deque()
        self.unfinished = []
        """(handle, {(group, page): slots that read it}, {(group, page): slot that writes it}, {slots}) of queued
        work, oldest first."""
        self.adapters = {}
        self.faults, self.once, self.raise_at_queue = {}, False, False
        self.poisonous = False
        """Whether "nan kv" strikes: pages are looked through for it, which takes time."""
        self.max_chunks = None
        self.raise_in_sample = self.raise_in_open = None
        self.violations = []
        self.forwarded = []
        """Every batch ever queued."""
        self.closed = 0
        self._arrived = threading.Condition()
        if mode == "thread":
            threading.Thread(target=self._worker, daemon=True).start()

    # --- the contract ------------------------------------------------------------------------------

    def open_slot(self, slot, state):
        self._expect(0 <= slot < self.config.max_slots, f"slot {slot} does not exist")
        self._expect(slot not in self.slots, f"slot {slot} is open")
        self._expect(not self._busy(slot), f"slot {slot} opened while a step on it is queued")
        if self.raise_in_open is not None and state.sampling.seed == self.raise_in_open:
            self.slots[slot] = None
            raise MemoryError("injected in open_slot")
        self.slots[slot] = SimpleNamespace(
            tokens=list(state.token_ids),
            prompt=state.prompt_tokens,
            sampling=state.sampling,
            logits=[],
            broken=False,
            offset=offset_of(self.adapters.get(state.adapter)),
        )

    def close_slot(self, slot):
        self._expect(not self._busy(slot), f"slot {slot} closed while a step on it is queued")
        self._expect(slot in self.slots, f"slot {slot} closed but not open")
        self.slots.pop(slot, None)

    def forward(self, batch):
        self.forwarded.append(batch)
        self._check(batch)
        if self.raise_at_queue:
            self._raise_faults(batch)
        return self._submit(lambda: self._forward(batch), batch)

    def sample(self, batch, masks=None, logits=None):
        self._expect(batch is self.forwarded[-1], "sampling another batch than the one just forwarded")
        return self._submit(lambda: self._sample(batch, masks or {}, logits or {}), batch)

    def logits(self, slot):
        while self._busy(slot):
            last = [entry[0] for entry in self.unfinished if slot in entry[3]][-1]
            self.run_until(last)
        (row,) = self.slots[slot].logits
        return row.copy()

    def load_adapter(self, name, adapter):
        self.adapters[name] = adapter.digest

    def drop_adapter(self, name):
        del self.adapters[name]

    def memory(self):
        return {"kv": sum(pages.nbytes for pages in self.pages)}

    def counters(self):
        return Counters()

    def close(self):
        self.closed += 1

    # --- checks ------------------------------------------------------------------------------------

    def _expect(self, condition, message):
        if not condition:
            self.violations.append(message)

    def _busy(self, slot):
        return any(slot in slots for handle, _, _, slots in self.unfinished if not handle.finished.is_set())

    def _check(self, batch):
        total = 0
        for chunk in batch.chunks:
            self._expect(chunk.slot in self.slots, f"slot {chunk.slot} is not open")
            self._expect(chunk.tokens > 0, "empty chunk")
            total += chunk.tokens if chunk.token_ids is not None and not chunk.drafts else 0
            for group, table in enumerate(chunk.page_tables):
                first = self._first_needed(chunk, group) // PAGE
                needed = table[first : (chunk.start + chunk.tokens - 1) // PAGE + 1]
                self._expect(-1 not in needed and len(needed) > 0, "a needed page is missing")
        slots = [chunk.slot for chunk in batch.chunks]
        self._expect(len(set(slots)) == len(slots), "two chunks of one slot")
        self._expect(len(slots) > 0 and total <= self.config.prefill_chunk_tokens, f"{total} prompt tokens")
        read, written = self._pages(batch)
        queued = [(r, w) for handle, r, w, _ in self.unfinished if not handle.finished.is_set()]
        for others_read, others_written in [*queued, (read, written)]:
            for key, slot in written.items():
                self._expect(
                    others_read.get(key, {slot}) <= {slot}, f"page {key} written while others read it"
                )
            for key, readers in read.items():
                writer = others_written.get(key)
                self._expect(
                    writer is None or readers <= {writer}, f"page {key} read while another writes it"
                )

    @staticmethod
    def _pages(batch):
        read, written = {}, {}
        for chunk in batch.chunks:
            for group, table in enumerate(chunk.page_tables):
                for index, page in enumerate(table):
                    if page >= 0:
                        read.setdefault((group, page), set()).add(chunk.slot)
                    if chunk.start // PAGE <= index <= (chunk.start + chunk.tokens - 1) // PAGE:
                        written[group, page] = chunk.slot
        return read, written

    def _first_needed(self, chunk, group):
        window = self.windows[group]
        return 0 if window is None else max(chunk.start - window + 1, 0)

    # --- work --------------------------------------------------------------------------------------

    def _submit(self, work, batch):
        handle = FakeHandle(self, work)
        self.unfinished = [entry for entry in self.unfinished if not entry[0].finished.is_set()]
        self.unfinished.append((handle, *self._pages(batch), {chunk.slot for chunk in batch.chunks}))
        with self._arrived:
            self.queue.append(handle)
            self._arrived.notify()
        if self.mode == "sync":
            self.run_until(handle)
        return handle

    def run_until(self, handle):
        if self.mode == "thread":
            assert handle.finished.wait(20)
        while not handle.finished.is_set():
            self.queue.popleft().run()

    def _worker(self):
        while not self.closed:
            with self._arrived:
                if not self._arrived.wait_for(lambda: self.queue, 0.2):
                    continue
                handle = self.queue.popleft()
            time.sleep(self.random.random() * 0.002)
            handle.run()

    def _raise_faults(self, batch):
        if self.max_chunks is not None and len(batch.chunks) > self.max_chunks:
            raise MemoryError(f"{len(batch.chunks)} chunks")
        for chunk in batch.chunks:
            key = self.slots[chunk.slot].sampling.seed, chunk.start + chunk.tokens
            fault = self.faults.get(key)
            if isinstance(fault, Exception):
                if self.once:
                    del self.faults[key]
                raise fault

    def _scribble(self, batch):
        """A step that raises leaves its own keys and values, and its slots, in any state."""
        for chunk in batch.chunks:
            for position in range(chunk.start, chunk.start + chunk.tokens):
                for group, table in enumerate(chunk.page_tables):
                    self.pages[group][table[position // PAGE], position % PAGE] = 12345
            self.slots[chunk.slot].tokens.append(0)
            self.slots[chunk.slot].broken = True

    def _forward(self, batch):
        try:
            self._raise_faults(batch)
        except Exception:
            self._scribble(batch)
            raise
        return ForwardResult(tuple(self._forward_chunk(chunk) for chunk in batch.chunks))

    def _forward_chunk(self, chunk):
        slot = self.slots[chunk.slot]
        if chunk.token_ids is None:
            at_the_last = chunk.start == len(slot.tokens) - 1
            self._expect(at_the_last or slot.broken, "a decode step not at the last token")
            tokens = slot.tokens[-1:]
        else:
            tokens = list(chunk.token_ids)
            known = len(tokens) - chunk.drafts
            own = slot.tokens[chunk.start : chunk.start + known]
            self._expect(tokens[:known] == own or slot.broken, "not the sequence's tokens")
            at_the_last = chunk.start == len(slot.tokens) - 1
            self._expect(not chunk.drafts or at_the_last or slot.broken, "guesses not after the last token")
        first, end = chunk.start, chunk.start + len(tokens)
        poisoned = self._write(chunk, slot, tokens)
        rows = []
        for group, table in enumerate(chunk.page_tables):
            values = self.pages[group][list(table)].reshape(-1)
            rows.append(digests(values, first, end, self.windows[group]))
        wanted = range(len(tokens)) if chunk.targets else range(len(tokens) - 1 - chunk.drafts, len(tokens))
        logits = [logits_of([group[row] for group in rows]) for row in wanted]
        for at, row in enumerate(wanted):
            if first + row in poisoned or self.faults.get((slot.sampling.seed, first + row + 1)) == "nan":
                logits[at] = np.full(VOCAB, np.nan, np.float32)
        if chunk.sample:
            slot.logits = logits[-1 - chunk.drafts :]
        if chunk.targets is None:
            return None
        self._expect(len(chunk.targets) == len(tokens), "targets are not one a row")
        if self.faults.get((slot.sampling.seed, end)) == "nan prompt":
            logits[0] = np.full(VOCAB, np.nan, np.float32)
        pairs = [(row, target) for row, target in zip(logits, chunk.targets, strict=True) if target >= 0]
        return tuple(token_logprob(row, target, chunk.top_logprobs) for row, target in pairs)

    def _write(self, chunk, slot, tokens):
        """Keys and values of a chunk -> the positions whose rows are not finite."""
        if not self.poisonous:
            positions = np.arange(chunk.start, chunk.start + len(tokens))
            values = np.array(tokens, np.uint64) + np.uint64(1 + slot.offset)
            for group, table in enumerate(chunk.page_tables):
                self.pages[group][np.array(table)[positions // PAGE], positions % PAGE] = values
            return ()
        poisoned = set()
        for position, token in enumerate(tokens, chunk.start):
            bad = self.faults.get((slot.sampling.seed, position + 1)) == "nan kv" or any(
                self._sees_poison(group, table, position) for group, table in enumerate(chunk.page_tables)
            )
            if bad:
                poisoned.add(position)
            for group, table in enumerate(chunk.page_tables):
                value = POISON if bad else token + 1 + slot.offset
                self.pages[group][table[position // PAGE], position % PAGE] = value
        return poisoned

    def _sees_poison(self, group, table, position):
        window = self.windows[group]
        first = 0 if window is None else max(position - window + 1, 0)
        seen = [self.pages[group][page] for page in table[first // PAGE : position // PAGE + 1]]
        begin = first // PAGE * PAGE
        return POISON in np.concatenate(seen)[first - begin : position - begin]

    def _sample(self, batch, masks, logits):
        chunks = [chunk for chunk in batch.chunks if chunk.sample]
        try:
            return SampleResult(
                tuple(self._sample_slot(c.slot, c, masks.get(c.slot), logits.get(c.slot)) for c in chunks)
            )
        except Exception:
            for chunk in chunks:
                self.slots[chunk.slot].broken = True
            raise

    def _sample_slot(self, slot_index, chunk, mask, replaced):
        slot = self.slots[slot_index]
        position = chunk.start + chunk.tokens - chunk.drafts
        self._expect(position == len(slot.tokens) or slot.broken, "sampling at the wrong position")
        self._expect(not chunk.drafts or (mask is None and replaced is None), "drafts with a mask")
        guesses = () if not chunk.drafts else chunk.token_ids[-chunk.drafts :]
        found = []
        for row, guess in zip(slot.logits, [*guesses, None], strict=True):
            found.append(self._sample_row(slot, row, position + len(found), mask, replaced))
            if found[-1].token_id != guess:
                break
        return tuple(found)

    def _sample_row(self, slot, row, position, mask, replaced):
        if self.raise_in_sample == (slot.sampling.seed, position):
            raise RuntimeError("injected in sample")
        counts = None
        if has_penalties(slot.sampling):
            counts = TokenCounts.of(slot.tokens, slot.prompt, VOCAB)
        allowed = None if mask is None else unpack_mask(mask, VOCAB)
        try:
            token = sample_token(
                row if replaced is None else replaced, slot.sampling, position, counts, allowed
            )
        except NumericalError:
            slot.broken = True
            return Sampled(-1, None)
        slot.tokens.append(token)
        wanted = slot.sampling.logprobs
        return Sampled(token, None if wanted is None else token_logprob(row, token, wanted))


class Harness:
    """An engine on a fake runner, and what came out of it."""

    def __init__(self, spec, config, runner, **options):
        self.spec, self.config, self.runner = spec, config, runner
        self.seconds = 0.0
        """What the engine's clock says."""
        self.engine = Engine(runner, config, spec, "digest", clock=lambda: self.seconds, **options)
        self.events = {}
        self.order = []
        """(request id, token id) as emitted."""

    def submit(self, request):
        return self.engine.submit(request)

    def step(self, timeout_seconds=0.0):
        events = self.engine.step(timeout_seconds)
        self.engine.check()
        for event in events:
            mine = self.events.setdefault(event.request_id, [])
            assert not mine or mine[-1].finish_reason is None, "an event after the last one"
            mine.append(event)
            if event.token_id is not None:
                self.order.append((event.request_id, event.token_id))
        return events

    def run(self, *requests):
        """Submit, step until everything has ended -> token ids of each request."""
        ids = [self.submit(request) for request in requests]
        self.drain()
        return [self.tokens(request_id) for request_id in ids]

    def drain(self):
        for _ in range(100_000):
            self.step()
            info = self.engine.info()
            if not (info["waiting"] or info["running"]):
                return
        raise AssertionError("the engine does not come to an end")

    def tokens(self, request_id):
        return [event.token_id for event in self.events[request_id] if event.token_id is not None]

    def reason(self, request_id):
        return self.events[request_id][-1].finish_reason

    def assert_whole(self):
        """No page, slot or handle outlived its request, and the contract was kept."""
        self.engine.check()
        assert self.engine.info()["pages"]["used"] == [0] * len(self.config.kv_pages)
        assert self.engine._scheduler.active == 0
        assert not self.runner.slots
        assert not self.runner.queue
        assert self.runner.violations == []


def make_harness(
    mode="sync",
    windows=(None,),
    pages=None,
    slots=4,
    chunk=64,
    context=512,
    runner_class=FakeRunner,
    seed=0,
    **options,
):
    """`options` are the engine's."""
    spec = make_spec(windows)
    groups = spec.kv_groups
    kv_pages = pages if pages is not None else (slots * context // PAGE,) * len(groups)
    config = RunnerConfig("cpu", "float32", "float32", context, slots, tuple(kv_pages), chunk)
    return Harness(spec, config, runner_class(spec, config, mode, seed), **options)


_REQUEST_FIELDS = {"priority", "salt", "adapter", "grammar", "logits_processors"}


def make_request(prompt=(1, 2, 3), new=8, seed=1, temperature=1.0, stop=(), score=None, **more):
    """`prompt`: token ids, or how many pseudo-random ones; `more`: other fields of the request or its sampling."""
    if isinstance(prompt, int):
        source = random.Random(prompt * 1000 + seed)
        prompt = [source.randrange(VOCAB) for _ in range(prompt)]
    return Request(
        prompt_token_ids=tuple(prompt),
        sampling=Sampling(
            temperature=temperature,
            seed=seed,
            **{name: value for name, value in more.items() if name not in _REQUEST_FIELDS},
        ),
        max_new_tokens=new,
        stop_token_ids=frozenset(stop),
        prompt_logprobs=score,
        **{name: value for name, value in more.items() if name in _REQUEST_FIELDS},
    )


@pytest.fixture
def guess_in_every_step(monkeypatch):
    """However wrong guesses are, given a drafter that is sure of them."""
    for limit in ("_FIRST_CREDIT", "_MOST_CREDIT"):
        monkeypatch.setattr(f"octavo.engine.speculation.{limit}", 1e9)


@pytest.fixture
def toy():
    """The builders above; harnesses made through it must be whole at the end of the test."""
    made = []

    def harness(*args, whole=True, **kwargs):
        made.append((make_harness(*args, **kwargs), whole))
        return made[-1][0]

    yield SimpleNamespace(
        harness=harness,
        request=make_request,
        spec=make_spec,
        expected=lambda harness, request, **more: expected_tokens(harness.spec, request, **more),
        Runner=FakeRunner,
        vocab=VOCAB,
    )
    for built, whole in made:
        if whole:
            built.assert_whole()
            built.engine.close()

"""The page pool against plain sets, and the page counts a sequence needs against brute force."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import octavo.engine.page_pool
from octavo.engine.page_pool import PagePool, pages_for_sequence, pages_for_tokens, pages_for_window


class Model:
    """What a pool of one group is, with sets: who holds which pages, and the order the others were let go in."""

    def __init__(self, total):
        self.free, self.holds, self.keys, self.cached = set(range(total)), [], {}, []

    def let_go(self, page):
        if page not in self.holds:
            if page in self.keys:
                self.cached.append(page)
            else:
                self.free.add(page)


@given(
    st.lists(st.tuples(st.sampled_from("take give share publish rename forget".split()), st.integers(0, 9)))
)
def test_the_pool_against_sets(actions):
    pool, model = PagePool((7,)), Model(7)
    for number, (action, pick) in enumerate(actions):
        held = model.holds[pick % len(model.holds)] if model.holds else None
        keyed = sorted(model.keys)[pick % len(model.keys)] if model.keys else None
        if action == "take":
            count = min(pick, pool.available(0))
            while len(model.free) < count:
                evicted = model.cached.pop(0)
                del model.keys[evicted]
                model.free.add(evicted)
            for page in pool.take(0, count):
                assert page not in model.holds
                model.free.remove(page)
                model.holds.append(page)
        elif action == "give" and held is not None:
            pool.give_back(0, [held])
            model.holds.remove(held)
            model.let_go(held)
        elif action == "share" and keyed is not None:
            assert pool.find(0, model.keys[keyed]) == keyed
            pool.share(0, keyed)
            model.holds.append(keyed)
            model.cached = [page for page in model.cached if page != keyed]
        elif action == "publish" and held is not None:
            pool.publish(0, held, b"%d" % number)
            model.keys.setdefault(held, b"%d" % number)
        elif action == "rename" and keyed is not None:
            pool.rename(0, keyed, model.keys[keyed], b"%d" % number)
            model.keys[keyed] = b"%d" % number
        elif action == "forget" and keyed is not None:
            pool.rename(0, keyed, model.keys.pop(keyed), None)
            if keyed in model.cached:
                model.cached.remove(keyed)
                model.free.add(keyed)
        pool.check([model.holds])
        assert (pool.free, pool.cached, pool.used) == (
            (len(model.free),),
            (len(model.cached),),
            (len(set(model.holds)),),
        )
        assert list(pool._cached[0]) == model.cached


def test_the_least_recently_held_is_evicted_first():
    pool = PagePool((3,))
    pages = pool.take(0, 3)
    for page in pages:
        pool.publish(0, page, b"%d" % page)
    pool.give_back(0, [pages[1], pages[0], pages[2]])
    pool.share(0, pages[1])
    pool.give_back(0, [pages[1]])
    assert [pool.take(0, 1)[0] for _ in range(3)] == [pages[0], pages[2], pages[1]]
    assert pool.evictions == 3
    assert pool.find(0, b"0") is None


def test_one_content_has_one_page():
    pool = PagePool((3,))
    first, second = pool.take(0, 2)
    pool.publish(0, first, b"key")
    pool.publish(0, second, b"key")
    assert pool.find(0, b"key") == first
    pool.give_back(0, [first, second])
    assert (pool.free, pool.cached) == ((2,), (1,))


def test_a_renamed_page_that_was_evicted_or_is_not_needed():
    pool = PagePool((1,))
    (page,) = pool.take(0, 1)
    pool.publish(0, page, b"private")
    pool.give_back(0, [page])
    assert pool.take(0, 1) == (page,)
    pool.rename(0, page, b"private", b"key")
    assert pool.find(0, b"key") is None

    pool = PagePool((2,))
    first, second = pool.take(0, 2)
    pool.publish(0, first, b"key")
    pool.publish(0, second, b"private")
    pool.give_back(0, [second])
    pool.rename(0, second, b"private", b"key")
    assert pool.find(0, b"key") == first
    assert pool.free == (1,)


def test_giving_back_what_is_not_held_is_caught():
    pool = PagePool((4,))
    pages = pool.take(0, 2)
    pool.give_back(0, pages)
    with pytest.raises(AssertionError, match="not held"):
        pool.give_back(0, pages[:1])
    with pytest.raises(AssertionError, match="not held"):
        pool.publish(0, pages[0], b"key")
    with pytest.raises(AssertionError, match="no key"):
        pool.share(0, pages[0])
    with pytest.raises(AssertionError, match="5 pages asked for"):
        pool.take(0, 5)
    pool.check([[]])


def test_check_notices_what_is_wrong():
    def pool():
        made = PagePool((4,))
        made.publish(0, *made.take(0, 1), b"key")
        return made

    lost, doubled, cached, keyless, freed = (pool() for _ in range(5))
    lost._free[0].pop()
    doubled._free[0].append(0)
    cached._cached[0][0] = None
    keyless._pages[0].clear()
    freed._keys[0][1] = freed._pages[0][b"other"] = 1
    freed._keys[0][1] = b"other"
    for broken in (lost, doubled, cached, keyless, freed):
        with pytest.raises(AssertionError):
            broken.check([[0]])
    for held in ([], [0, 0], [1]):
        with pytest.raises(AssertionError, match="sequences hold"):
            pool().check([held])
    pool().check([[0]])


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (31, 1), (32, 1), (33, 2), (64, 2), (65, 3)])
def test_pages_for_tokens(tokens, pages):
    assert pages_for_tokens(tokens) == pages


@given(st.integers(1, 200), st.integers(1, 150))
def test_a_window_needs_exactly_this_many_pages(window, chunk):
    """The most pages touched by a chunk's keys (or two decode steps' keys), over every alignment."""
    span = max(chunk, 2)
    most = max((start + span - 1) // 32 - (start - window + 1) // 32 + 1 for start in range(1000, 1032))
    assert pages_for_window(window, chunk) == most


def test_pages_for_sequence():
    assert pages_for_sequence(None, 1000, 64) == 32
    assert pages_for_sequence(40, 50, 64) == 2
    assert pages_for_sequence(40, 1000, 64) == pages_for_window(40, 64)


@pytest.mark.parametrize(
    "module", ["page_pool", "paging", "prefix", "scheduler", "sequence", "speculation", "waiting"]
)
def test_only_the_standard_library_is_imported(module):
    path = Path(octavo.engine.page_pool.__file__).with_name(f"{module}.py")
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert all(name.split(".")[0] in sys.stdlib_module_names | {"octavo"} for name in names)

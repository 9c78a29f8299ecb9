"""The page pool against a plain set model, and the page counts a sequence needs against brute force."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import octavo.engine.page_pool
from octavo.engine.page_pool import PagePool, pages_for_sequence, pages_for_tokens, pages_for_window


@given(st.lists(st.tuples(st.integers(0, 1), st.booleans(), st.integers(0, 5)), max_size=60))
def test_free_and_used_are_always_everything(actions):
    pool = PagePool((7, 4))
    held = [[], []]
    for group, take, count in actions:
        if take:
            count = min(count, pool.total[group] - pool.used[group])
            pages = pool.allocate(group, count)
            assert not set(pages) & set(held[group])
            held[group] += pages
        else:
            pool.free(group, held[group][:count])
            del held[group][:count]
        pool.check()
        assert pool.used == (len(held[0]), len(held[1]))


def test_a_double_free_is_caught():
    pool = PagePool((4,))
    pages = pool.allocate(0, 2)
    pool.free(0, pages)
    with pytest.raises(AssertionError, match="not allocated"):
        pool.free(0, pages[:1])
    with pytest.raises(AssertionError, match="not allocated"):
        pool.free(0, [3])
    with pytest.raises(AssertionError, match="5 pages asked for, 4 free"):
        pool.allocate(0, 5)
    pool.check()


def test_check_notices_a_lost_and_a_doubled_page():
    lost, doubled = PagePool((4,)), PagePool((4,))
    lost._free[0].pop()
    doubled._used[0].add(2)
    for pool in (lost, doubled):
        with pytest.raises(AssertionError, match="are not the 4 there are"):
            pool.check()


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


@pytest.mark.parametrize("module", ["page_pool", "sequence", "scheduler", "step", "prefix"])
def test_only_the_standard_library_is_imported(module):
    path = Path(octavo.engine.page_pool.__file__).with_name(f"{module}.py")
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert all(name.split(".")[0] in sys.stdlib_module_names | {"octavo"} for name in names)

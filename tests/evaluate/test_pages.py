"""The quant card, the picture and what is kept of an evaluation."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from datetime import date
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from octavo.errors import UsageError
from octavo.evaluate.card import render_card, write_card
from octavo.evaluate.card_store import keep, kept
from octavo.evaluate.plot import check_plot, write_plot

TODAY = date(2026, 1, 2)


class Page(HTMLParser):
    """Fails on tags that do not nest; collects text and addresses."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.addresses, self.tags = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_card_is_one_page_with_every_number(evaluation, tmp_path):
    path = tmp_path / "card.html"
    write_card(evaluation, path, TODAY)
    page = Page(path.read_text(encoding="utf-8"))
    words = " ".join(" ".join(page.text).split())
    assert page.addresses == []
    assert "script" not in page.tags
    assert page.tags.count("rect") == 6
    for expected in (
        "int8",
        "int4",
        "134 MiB",
        "8.25",
        "120.0",
        "20.50 ± 0.25",
        "2.00e-03 ± 1e-04",
        "97.0 %",
    ):
        assert expected in words
    assert "1,000 tokens of a & b" in words
    assert "2026-01-02" in words
    assert "q4_1" in words


def test_card_escapes_what_files_say(evaluation):
    html = render_card(evaluation, TODAY)
    assert "<tiny>" not in html
    assert "&lt;tiny&gt;" in html


def test_card_without_reference(evaluation):
    alone = dataclasses.replace(
        evaluation,
        reference=None,
        formats=tuple(dataclasses.replace(each, divergence=None) for each in evaluation.formats),
    )
    page = Page(render_card(alone, TODAY))
    assert "svg" not in page.tags
    assert "KL" not in " ".join(page.text)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("compared", [True, False])
def test_picture(evaluation, tmp_path, suffix, compared):
    if not compared:
        formats = tuple(dataclasses.replace(each, divergence=None) for each in evaluation.formats)
        evaluation = dataclasses.replace(evaluation, formats=formats)
    path = tmp_path / f"quality{suffix}"
    check_plot(path)
    write_plot(evaluation, path)
    data = path.read_bytes()
    if suffix == ".png":
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000
    else:
        assert ElementTree.fromstring(data).tag.endswith("svg")


def test_pictures_that_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"\.png or \.svg, not as \.jpeg"):
        check_plot(tmp_path / "a.jpeg")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs matplotlib") as caught:
        check_plot(tmp_path / "a.png")
    assert "octavo[plot]" in caught.value.remedy


def test_what_is_kept_is_merged_by_format(evaluation, tmp_path):
    int8, int4 = evaluation.formats
    keep(tmp_path, dataclasses.replace(evaluation, formats=(int8,)), TODAY)
    keep(tmp_path, dataclasses.replace(evaluation, formats=(int4,)), TODAY)
    found = kept(tmp_path, evaluation.fingerprint)
    assert list(found) == ["int8", "int4"]
    assert found["int8"] == (
        "int8: perplexity 20.50 ± 0.25, KL 2.00e-03 ± 1e-04 nats, top-1 97.0% (95.7% .. 97.9%) "
        "(1,000 tokens of a & b, 2026-01-02, reference none)"
    )
    assert kept(tmp_path, "0" * 64) == {}
    assert len(list((tmp_path / "cards").iterdir())) == 1


def test_fewer_tokens_and_a_format_against_itself_replace_nothing(evaluation, tmp_path):
    keep(tmp_path, evaluation, TODAY)
    good = kept(tmp_path, evaluation.fingerprint)
    keep(tmp_path, dataclasses.replace(evaluation, scored_tokens=999), TODAY)
    keep(tmp_path, dataclasses.replace(evaluation, scored_tokens=2000, reference="int8"), TODAY)
    now = kept(tmp_path, evaluation.fingerprint)
    assert now["int8"] == good["int8"]
    assert "2,000 tokens" in now["int4"]


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"{"])
def test_damage_counts_as_nothing_kept(evaluation, tmp_path, content):
    keep(tmp_path, evaluation, TODAY)
    (path,) = (tmp_path / "cards").iterdir()
    path.write_bytes(content)
    assert kept(tmp_path, evaluation.fingerprint) == {}


def test_json_has_intervals(evaluation):
    found = json.loads(json.dumps(evaluation.to_json()))
    int8 = found["formats"][0]
    assert int8["perplexity"]["interval95"] == pytest.approx([20.5 - 0.49, 20.5 + 0.49], abs=1e-3)
    assert int8["divergence"]["layer_errors"] == [0.01, 0.03, 0.02]
    assert int8["divergence"]["kl_nats"]["mean"] == 2e-3

"""`octavo eval` as a user calls it: wrong inputs on nothing, and for real on the default model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import octavo.evaluate.evaluation  # noqa: F401  (now, with the real LLM: `cli` puts a fake one in its place)
from octavo.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "code", "error", "fix"),
    [
        (["--quant", "int8", "--formats", "int8"], 2, "--quant and --formats contradict", "Leave one"),
        (["--formats", "int8,int9"], 2, "--formats: there is no format 'int9'", "Formats: auto, none, int8"),
        (["--reference", "fp32"], 2, "--reference: there is no format 'fp32'", "Formats: auto, none, int8"),
        (["--plot", "a.pdf"], 2, "written as .png or .svg, not as .pdf", "a.png"),
        (["--plot", "missing/a.png"], 2, "there is no folder", "Make it first"),
        (["--card", "missing/a.html"], 2, "there is no folder", "Make it first"),
        (["--text", "missing.txt"], 2, "cannot read missing.txt", "--text"),
        (["--tokens", "1"], 2, "--tokens", "octavo eval --help"),
        (["-m", "missing/model"], 3, "missing/model", "octavo"),
    ],
)
def test_wrong_arguments_say_what_to_do(cli, arguments, code, error, fix):
    done = cli("eval", "--offline", *arguments)
    assert (done.code, done.out) == (code, "")
    assert len(done.err_lines) == 2
    assert error in done.err_lines[0]
    assert fix.lower() in done.err_lines[1].lower() or fix == "octavo"


@pytest.fixture
def evaluate(default_model_path, tmp_path, monkeypatch, capsys):
    """Returns what was printed; `evaluate.said` is what went to stderr with it."""
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main([*arguments, "--device", "cpu"] if arguments[0] == "eval" else list(arguments))
        out, err = capsys.readouterr()
        assert code == 0, err
        run.said = err
        return out

    return run


@pytest.mark.model
def test_for_real(evaluate, default_model_path, tmp_path):
    model = ["-m", str(default_model_path)]
    found = json.loads(
        evaluate(
            *("eval", *model, "--formats", "int8,auto", "--reference", "none", "--tokens", "100"),
            *("--json", "--card", "card.html", "--plot", "quality.svg"),
        )
    )
    assert "no --reference" not in evaluate.said
    assert found["scored_tokens"] == 99
    int8, stored = found["formats"]
    assert int8["stored_as"] == "int8"
    assert int8["bits_per_weight"] == pytest.approx(8.25, abs=0.01)
    assert 10 < int8["perplexity"]["mean"] < 60
    assert 0 < int8["divergence"]["kl_nats"]["mean"] < 0.006
    assert stored["divergence"]["kl_nats"]["mean"] == 0
    assert stored["stored_as"] == "q4_1 + q8_0"
    assert len(int8["divergence"]["layer_errors"]) == 30
    assert int8["decode_tokens_per_second"] > 1
    assert "q4_1 + q8_0" in Path("card.html").read_text(encoding="utf-8")
    assert "svg" in Path("quality.svg").read_text(encoding="utf-8")
    shown = json.loads(evaluate("models", "show", str(default_model_path), "--json"))
    assert [line.partition(":")[0] for line in shown["quality"]] == ["int8", "auto"]


@pytest.mark.model
def test_a_text_of_ones_own(evaluate, default_model_path, tmp_path):
    (tmp_path / "mine.txt").write_text("one two three four five six seven eight nine ten " * 3)
    model = ["-m", str(default_model_path)]
    out = evaluate("eval", *model, "--text", "mine.txt", "--tokens", "40", "--no-cache")
    title, header, row = out.splitlines()
    assert "--reference none measures the distance from full precision too" in evaluate.said
    assert title.endswith("30 tokens of mine.txt, in segments of 512")
    assert header.split() == ["format", "weights", "bits/weight", "tokens/s", "perplexity"]
    assert row.startswith("auto (q4_1 + q8_0)")
    shown = json.loads(evaluate("models", "show", str(default_model_path), "--json"))
    assert shown["quality"] == []

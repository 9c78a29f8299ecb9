"""`octavo bench`: how fast a model generates here, how much of the machine that is, and against a peer."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.configuration import read_configuration
from octavo.cli.loading import with_fallback
from octavo.cli.options import Given, accepts
from octavo.cli.output import note, note_all, write_json, write_table
from octavo.cli.progress import counting_bar
from octavo.settings import Settings
from octavo.types import Progress

if TYPE_CHECKING:
    from rich.table import Table

    from octavo.bench.figures import Spread
    from octavo.bench.report import Report
    from octavo.bench.subject import Subject

_SETTINGS = tuple(
    field.name for field in dataclasses.fields(Settings) if field.name not in ("max_sequences", "filter")
)


@accepts(Settings, only=_SETTINGS)
def bench(
    *,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate after it.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Sequences generated together.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds; medians are of these.")] = 5,
    peer: Annotated[
        str | None,
        typer.Option(
            help="Interleave another engine: transformers[=bf16|fp32|int8|bf16-compiled|fp32-compiled], or "
            "llama.cpp[=PATH of llama-bench].",
            metavar="NAME",
        ),
    ] = None,
    peer_model: Annotated[
        str | None, typer.Option(help="What the peer reads instead of MODEL, e.g. a GGUF file.")
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="First find the fastest tiles of this model's shapes on this card, and keep them."
        ),
    ] = False,
    tune_seconds: Annotated[float, typer.Option(min=1, help="How long --tune may take.")] = 90,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    said: Given,
) -> None:
    """Measure how fast a model generates here.

    Prompts are random tokens, other ones each round; decoding is greedy. Without --context, it is what the
    prompt and the new tokens take. Speculation is off unless asked for. Medians with their least and most.
    """
    configuration = read_configuration(said)
    from octavo.bench.figures import Workload
    from octavo.bench.interleaved import measure
    from octavo.bench.peers import check_peer, open_peer
    from octavo.bench.report import make_report
    from octavo.bench.subject import Subject
    from octavo.errors import UsageError

    if peer is not None:
        check_peer(peer)
    elif peer_model is not None:
        raise UsageError("--peer-model is given without a peer", remedy="Add --peer, or leave it out.")
    workload = Workload(prompt_tokens, max_new_tokens, batch)
    if tune:
        from octavo.bench.tuning import tune_tiles

        tuned, _ = with_fallback(
            configuration, lambda settings, progress: tune_tiles(settings, tune_seconds, progress)
        )
        note(f"tiles of {tuned.shapes} shapes were tuned and are kept in {tuned.path}")

    def load(settings: Settings, progress: Progress | None) -> Subject:
        if settings.speculation == "auto":
            # Greedy answers to random tokens repeat themselves: guesses would flatter.
            settings = dataclasses.replace(settings, speculation="off")
        return Subject(settings, workload, progress)

    subject, _ = with_fallback(configuration, load)
    with contextlib.closing(subject), contextlib.ExitStack() as open_peers:
        note_all(subject.notices)
        other = None
        if peer is not None:
            other = open_peers.enter_context(
                contextlib.closing(open_peer(peer, peer_model, subject.planned, workload))
            )
        with counting_bar("measuring", repeat + 1) as done:
            measured = measure(subject, other, repeat, done)
        report = make_report(workload, subject.facts, None if other is None else other.facts, measured)
    if json:
        write_json(report.to_json())
        return
    write_table(*_tables(report))
    if report.formats_differ and report.peer_facts is not None:
        note(
            f"formats differ: octavo computes from {report.facts.quant}, {report.peer_facts.name} in "
            f"{report.peer_facts.format}"
        )


def _tables(report: Report) -> tuple[Table | str, ...]:
    from rich.text import Text

    facts, load = report.facts, report.workload
    runs = ", ".join(filter(None, (facts.isa, None if facts.threads is None else f"{facts.threads} threads")))
    sequences = "1 sequence" if load.sequences == 1 else f"{load.sequences} sequences"
    title = (
        f"{facts.model}, {facts.quant} on {facts.device} ({facts.runner} runner{', ' if runs else ''}{runs}; "
        f"{facts.processor}): {sequences} of {load.prompt_tokens} prompt + {load.new_tokens} new tokens"
    )
    tables: list[Table | str] = [Text(title), _speeds(report), _machine(report)]  # type: ignore[list-item]
    return tuple(tables)


def _speeds(report: Report) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("octavo", justify="right")
    if report.peer_facts is not None:
        table.add_column(report.peer_facts.name, justify="right")
        table.add_column("ratio", justify="right")
    for name, words, digits in (
        ("prefill_tokens_per_second", "prefill, tokens/s", 1),
        ("decode_tokens_per_second", "decode, tokens/s", 1),
        ("total_tokens_per_second", "both, tokens/s", 1),
        ("first_token_seconds", "first token, seconds", 3),
    ):
        cells = [_spread(getattr(report.octavo, name), digits)]
        if report.peer is not None:
            cells.append(_spread(getattr(report.peer, name), digits))
            ratio = (report.ratios or {}).get(name)
            cells.append("" if ratio is None else _spread(ratio, 2))
        table.add_row(words, *cells)
    return table


def _machine(report: Report) -> Table:
    from rich.table import Table

    from octavo.units import readable_bytes

    def size(count: int | None) -> str:
        return "not known" if count is None else readable_bytes(count)

    facts, memory = report.facts, report.memory
    table = Table(show_header=False, box=None, pad_edge=False)
    packed = "packed weights from the cache" if facts.packed_from_cache else "packed now"
    table.add_row("load", f"{facts.load_seconds:.2f} s ({packed})")
    if memory.anonymous_bytes is None:
        table.add_row("peak memory", size(memory.peak_bytes))
    else:
        parts = f"{size(memory.anonymous_bytes)} anonymous + {size(memory.mapped_bytes)} of files in the end"
        table.add_row("peak memory", f"{size(memory.peak_bytes)} ({parts})")
    table.add_row("weights a token", f"{facts.weight_bytes_per_token / 1e6:.1f} MB")
    if report.read_bandwidth is None or report.bandwidth_share is None:
        table.add_row("read bandwidth", "not measured on this device")
    else:
        bandwidth, share = report.read_bandwidth, report.bandwidth_share
        table.add_row(
            "read bandwidth",
            f"{bandwidth.median / 1e9:.1f} GB/s ({bandwidth.least / 1e9:.1f} .. {bandwidth.most / 1e9:.1f})",
        )
        table.add_row(
            "share of it", f"{share.median:.0%} ({share.least:.0%} .. {share.most:.0%}) by decoding's weights"
        )
    if (peer := report.peer_facts) is not None:
        table.add_row(peer.name, f"{peer.version}, {peer.format}, from {peer.reads}")
        if peer.load_seconds is not None:
            table.add_row("", f"load {peer.load_seconds:.2f} s, peak memory {size(peer.peak_bytes)}")
    return table


def _spread(spread: Spread, digits: int) -> str:
    return f"{spread.median:.{digits}f} ({spread.least:.{digits}f} .. {spread.most:.{digits}f})"

"""`octavo eval`: perplexity of a model in a format, and what the format costs against another."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from octavo.cli.configuration import read_configuration
from octavo.cli.facts import storage_facts
from octavo.cli.loading import with_fallback
from octavo.cli.options import Given, accepts
from octavo.cli.output import note, note_all, write_json, write_table
from octavo.cli.progress import counting_bar
from octavo.errors import UsageError
from octavo.settings import QuantName, Settings
from octavo.types import Progress

if TYPE_CHECKING:
    from rich.table import Table

    from octavo.evaluate.evaluation import Prepared
    from octavo.evaluate.results import Evaluation, FormatQuality


@accepts(
    Settings,
    only=(
        *("model", "revision", "quant", "device", "dtype", "runner", "isa", "context", "threads"),
        *("offline", "cache_dir", "cache"),
    ),
)
def evaluate(
    *,
    formats: Annotated[
        str | None,
        typer.Option(
            help="Several formats instead of --quant's one, with commas: int8,llm-int8.", metavar="A,B"
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Compare with this format, e.g. none (full precision): KL divergence, agreement, error after each "
            "layer. Takes torch and a pass more over the text for each.",
            metavar="FORMAT",
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text file [default: Alice's Adventures in Wonderland, bundled].")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="How many of its first tokens.")] = 4096,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Write a picture (.png or .svg): quality against bytes and tokens/s, a point a format."
        ),
    ] = None,
    card: Annotated[Path | None, typer.Option(help="Write the quant card, one HTML page.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    said: Given,
) -> None:
    """Measure what a format costs.

    Perplexity on a text, in the runner that generates. With --reference also the distance of the weights from
    another format. The result is kept, and octavo models show quotes it.
    """
    if formats is not None and "quant" in said:
        raise UsageError("--quant and --formats contradict each other", remedy="Leave one of them out.")
    configuration = read_configuration(said)
    names = None if formats is None else [_format(name.strip(), "--formats") for name in formats.split(",")]
    against = None if reference is None else _format(reference, "--reference")
    for path in filter(None, (plot, card)):
        _check_folder(path)
    from octavo.evaluate.card import write_card
    from octavo.evaluate.card_store import keep
    from octavo.evaluate.evaluation import evaluate as measure
    from octavo.evaluate.evaluation import prepare
    from octavo.evaluate.plot import check_plot, write_plot
    from octavo.evaluate.text import Text
    from octavo.paths import cache_root

    if plot is not None:
        check_plot(plot)
    read = Text.bundled() if text is None else Text.read(text)

    def plan(settings: Settings, progress: Progress | None) -> Prepared:
        return prepare(
            settings,
            formats=list(dict.fromkeys(names or [settings.quant])),
            reference=against,
            text=read,
            tokens=tokens,
            progress=progress,
        )

    prepared, resolved = with_fallback(configuration, plan)
    source = next(iter(prepared.formats.values())).source
    note_all((*source.notices, *storage_facts(source)))
    scored = prepared.segments.scored_tokens
    passes = len(prepared.formats) if against is None else 2 * len(prepared.formats) + 1
    note(
        f"scoring {scored:,} tokens of {read.name}, in {passes} passes"
        if passes > 1
        else f"scoring {scored:,} tokens of {read.name}"
    )
    if against is None:
        note(
            "no --reference, so perplexity alone; --reference none measures the distance from full precision too "
            "(KL divergence, agreement, layer errors) and takes longer"
        )
    if prepared.segments.text_tokens < tokens:
        note(f"the text has only {prepared.segments.text_tokens:,} tokens, of the {tokens:,} asked for")
    found = measure(prepared, counting_bar)
    today = datetime.now(UTC).date()
    if resolved.settings.cache:
        keep(cache_root(resolved.settings.cache_dir), found, today)
    if plot is not None:
        write_plot(found, plot)
    if card is not None:
        write_card(found, card, today)
    if json:
        write_json(found.to_json())
        return
    tables: list[Table | str] = [_title(found), _table(found)]
    if found.reference is not None:
        tables.append(_layers(found))
    write_table(*tables)


def _format(name: str, flag: str) -> QuantName:
    known: tuple[QuantName, ...] = get_args(QuantName)
    for each in known:
        if name == each:
            return each
    raise UsageError(f"{flag}: there is no format {name!r}", remedy=f"Formats: {', '.join(known)}.")


def _check_folder(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise UsageError(
            f"there is no folder {path.absolute().parent} to write {path.name} in", remedy="Make it first."
        )


def _title(found: Evaluation) -> str:
    return (
        f"{found.model}: {found.scored_tokens:,} tokens of {found.text}, in segments of {found.segment_tokens}"
        + ("" if found.reference is None else f"; distances are from {found.reference_in_words}, in fp32")
    )


def _table(found: Evaluation) -> Table:
    from rich.table import Table

    from octavo.evaluate.results import plus_minus
    from octavo.units import readable_bytes

    table = Table(box=None, pad_edge=False)
    table.add_column("format")
    columns = ["weights", "bits/weight", "tokens/s", "perplexity"]
    for column in columns + ([] if found.reference is None else ["KL, nats", "top-1 agreement"]):
        table.add_column(column, justify="right")

    def distance(each: FormatQuality) -> list[str]:
        if each.divergence is None:
            return []
        kl, top1 = each.divergence.kl, each.divergence.agreement
        return [
            f"{kl.mean:.2e}{plus_minus(kl, '.0e')}",
            f"{top1.value:.1%} ({top1.low:.1%} .. {top1.high:.1%})",
        ]

    for each in found.formats:
        named = each.format if each.stored_as == each.format else f"{each.format} ({each.stored_as})"
        speed = each.decode_tokens_per_second
        table.add_row(
            named,
            readable_bytes(each.weight_bytes),
            f"{each.bits_per_weight:.2f}",
            "-" if speed is None else f"{speed:.1f}",
            f"{each.perplexity.mean:.2f}{plus_minus(each.perplexity, '.2f')}",
            *distance(each),
        )
    return table


def _layers(found: Evaluation) -> str:
    """The first, the worst and the last layer of each format; --json has them all."""
    lines = []
    for each in found.formats:
        if each.divergence is None:
            continue
        errors = each.divergence.layer_errors
        worst = max(range(len(errors)), key=errors.__getitem__)
        picked = dict.fromkeys((0, worst, len(errors) - 1))
        shown = ", ".join(f"{errors[i]:.1e} after layer {i + 1}" for i in picked)
        lines.append(f"relative error of hidden states, {each.format}: {shown}")
    return "\n".join(lines)

"""`octavo explain`: what runs where and why, of a model that is loaded for it; with --run also what was counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.configuration import read_configuration
from octavo.cli.facts import card_memory
from octavo.cli.loading import loaded_model
from octavo.cli.options import Given, accepts, with_model
from octavo.cli.output import note_all, write_json, write_table
from octavo.settings import SamplingParams, Settings

if TYPE_CHECKING:
    from rich.table import Table

RUN_TOKENS = 32
_RUN_PROMPT = tuple(range(1, 65))
"""Token ids that every vocabulary has: a model without a tokenizer runs too."""


@accepts(Settings)
def explain(
    name: Annotated[str | None, typer.Argument(metavar="MODEL", help="The same as --model.")] = None,
    *,
    run: Annotated[
        bool,
        typer.Option("--run", help=f"Generate {RUN_TOKENS} tokens first, and count what is done for them."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    said: Given,
) -> None:
    """Load a model and show what runs where and why.

    Runner, kernels, formats, layers, what was considered and declined, and counters since the start.
    """
    with loaded_model(read_configuration(with_model(said, name))) as loaded:
        llm = loaded.llm
        note_all(llm.notices)
        if run:
            tokens = min(RUN_TOKENS, llm.context_tokens - 1)
            prompt = _RUN_PROMPT[: llm.context_tokens - tokens]
            llm.generate(prompt, SamplingParams(max_new_tokens=tokens, temperature=0, ignore_eos=True))
        facts = llm.explain()
    if json:
        write_json(facts)
        return
    from rich.text import Text

    reasons = [*facts["reasons"], f"speculation: {facts['speculation']}"]
    title = " at ".join(name for name in (facts["model"], facts["revision"]) if name is not None)
    write_table(
        Text(title),
        _pairs("Runner", _runner(facts["runner"])),
        *([_pairs("Card", _card(card))] if (card := facts["device"]["card"]) else []),
        _layers(facts["layers"]),
        _pairs("Counters", _flat(facts["counters"] | {"compiled": facts["compiled"]})),
        Text("\n".join(f"- {reason}" for reason in reasons)),
    )


def _runner(runner: Mapping[str, Any]) -> dict[str, str]:
    return {
        "name": runner["name"],
        "threads": "-" if runner["threads"] is None else str(runner["threads"]),
        "layout": runner["layout"],
        "computes in": f"{runner['compute_dtype']}, keys and values in {runner['kv_dtype']}",
        **runner["kernels"],
        "same bits": _promise(runner),
    }


def _card(card: Mapping[str, Any]) -> dict[str, str]:
    from octavo.units import readable_bytes

    shown = {"memory": card_memory(card)}
    for each in card["others"]:
        used = "an unknown amount" if each["used_bytes"] is None else readable_bytes(each["used_bytes"])
        shown[f"process {each['pid']}"] = used
    if card["energy_joules"] is not None:
        shown["energy"] = f"{card['energy_joules']:.0f} J since the driver was loaded"
    return shown


def _promise(runner: Mapping[str, Any]) -> str:
    if not runner["batch_invariant"]:
        return "not promised"
    return "in any batch" + (", however a prompt is cut" if runner["chunk_invariant"] else "")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name} ")
        else:
            flat[f"{prefix}{name}".replace("_", " ")] = str(value)
    return flat


def _pairs(title: str, values: Mapping[str, str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    for name, value in values.items():
        table.add_row(Text(name), Text(value))
    return table


def _layers(layers: list[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(
        "part", "what", "format", "where", title="Layers", title_justify="left", box=None, pad_edge=False
    )
    for each in layers:
        table.add_row(each["layers"], Text(each["what"]), ", ".join(each["formats"]), each["device"])
    return table

"""The quant card: one self-contained HTML page that says what each format of a model costs, and how it was measured."""

from __future__ import annotations

from datetime import date
from importlib import resources
from pathlib import Path

from octavo.evaluate.results import Evaluation, plus_minus
from octavo.units import readable_bytes
from octavo.version import __version__


def render_card(evaluation: Evaluation, today: date) -> str:
    """HTML. Every value is escaped."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(readable_bytes=readable_bytes, plus_minus=plus_minus)
    template = (resources.files("octavo.evaluate") / "card.html.jinja").read_text(encoding="utf-8")
    errors = [e for each in evaluation.formats if each.divergence for e in each.divergence.layer_errors]
    return environment.from_string(template).render(
        evaluation=evaluation,
        today=today.isoformat(),
        version=__version__,
        largest_error=max(errors, default=0.0),
    )


def write_card(evaluation: Evaluation, path: Path, today: date) -> None:
    path.write_text(render_card(evaluation, today), encoding="utf-8")

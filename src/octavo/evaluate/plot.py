"""The picture: quality against bytes and against speed, one point a format. Needs matplotlib, which is optional."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

from octavo.errors import UsageError
from octavo.evaluate.results import Evaluation, FormatQuality

SUFFIXES = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Raises UsageError for another kind of file, for a folder that is not there, and without matplotlib."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"a picture is written as {' or '.join(SUFFIXES)}, not as {path.suffix or path.name}",
            remedy=f"Name it {path.with_suffix('.png').name}.",
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "--plot needs matplotlib, which is not installed", remedy="pip install 'octavo[plot]'"
        )


def write_plot(evaluation: Evaluation, path: Path) -> None:
    """KL to the reference where there is one, else perplexity: lower is better in both panels.

    KLs of formats differ by orders of magnitude, and that of what is stored is 0: hence the axis.
    """
    from matplotlib.figure import Figure

    compared = [each for each in evaluation.formats if each.divergence is not None]
    shown = compared or list(evaluation.formats)
    quality = f"KL to {evaluation.reference_in_words}, nats a token" if compared else "perplexity"
    figure: Any = Figure(figsize=(9, 4.4), layout="constrained")
    against_bytes, against_speed = figure.subplots(1, 2, sharey=True)
    least = min((_quality(each)[0] for each in compared if _quality(each)[0] > 0), default=None)
    if least is not None:
        # From the power of ten below the least KL on the axis is logarithmic, and its ticks say so.
        decade = 10.0 ** math.floor(math.log10(least))
        against_bytes.set_yscale("symlog", linthresh=decade, subs=range(2, 10))
    for number, each in enumerate(shown):
        y, error = _quality(each)
        speed = each.decode_tokens_per_second
        for axes, x in ((against_bytes, each.weight_bytes / 1e6), (against_speed, speed)):
            if x is not None:
                label = each.format if axes is against_bytes else None
                axes.errorbar(x, y, yerror_of(error), fmt="o", capsize=3, color=f"C{number}", label=label)
    against_bytes.set(xlabel="packed weights, MB", ylabel=f"{quality} (bars: 95 %)")
    figure.legend(loc="outside lower center", ncols=len(shown))
    runner = shown[0].runner
    against_speed.set(xlabel=f"decode, tokens/s ({runner} runner)")
    for axes in (against_bytes, against_speed):
        axes.grid(alpha=0.3)
        axes.margins(0.2)
    figure.suptitle(f"{evaluation.model}: {evaluation.scored_tokens:,} tokens of {evaluation.text}")
    figure.savefig(path, dpi=150)


def yerror_of(error: float | None) -> float | None:
    """Bars are 95 % intervals."""
    return None if error is None else 1.96 * error


def _quality(each: FormatQuality) -> tuple[float, float | None]:
    estimate = each.perplexity if each.divergence is None else each.divergence.kl
    return estimate.mean, estimate.standard_error

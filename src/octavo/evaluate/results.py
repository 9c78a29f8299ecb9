"""What an evaluation found, as values and as JSON; imports nothing heavy, so that `models show` may quote it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from octavo.evaluate.estimates import Estimate

if TYPE_CHECKING:
    from octavo.evaluate.divergence import Divergence


@dataclass(frozen=True, slots=True)
class FormatQuality:
    """One format of one model."""

    format: str
    """The --quant value."""
    stored_as: str
    """What the matrices are in: "int8", "q4_1 + q8_0"."""
    weight_bytes: int
    """Packed."""
    bits_per_weight: float
    """Of matrices and the table, scales included."""
    device: str
    runner: str
    decode_tokens_per_second: float | None
    perplexity: Estimate
    divergence: Divergence | None
    """From the reference; None without one."""

    def in_words(self) -> str:
        """`int8: perplexity 24.1 ± 0.6, KL 2.1e-03 ± 1e-04 nats, top-1 97.3 % (96.8 .. 97.7)`."""
        words = [f"perplexity {self.perplexity.mean:.2f}{plus_minus(self.perplexity, '.2f')}"]
        if self.divergence is not None:
            kl, top1 = self.divergence.kl, self.divergence.agreement
            words.append(f"KL {kl.mean:.2e}{plus_minus(kl, '.0e')} nats")
            words.append(f"top-1 {top1.value:.1%} ({top1.low:.1%} .. {top1.high:.1%})")
        return f"{self.format}: {', '.join(words)}"


@dataclass(frozen=True, slots=True)
class Evaluation:
    model: str
    revision: str | None
    fingerprint: str
    text: str
    scored_tokens: int
    segment_tokens: int
    reference: str | None
    stored_as: str | None
    """Types of the checkpoint's own weights where they are quantized: what reference "none" dequantizes."""
    machine: str
    formats: tuple[FormatQuality, ...]

    @property
    def reference_in_words(self) -> str:
        return "full precision" if self.reference == "none" else str(self.reference)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings; intervals beside the means they are of."""
        facts = dataclasses.asdict(self)
        facts["formats"] = [_format_json(each) for each in self.formats]
        return facts


def plus_minus(estimate: Estimate, form: str) -> str:
    """` ± 0.61`: one standard error, where it is known."""
    error = estimate.standard_error
    return "" if error is None else f" ± {error:{form}}"


def _format_json(quality: FormatQuality) -> dict[str, Any]:
    facts = dataclasses.asdict(quality)
    facts["perplexity"]["interval95"] = quality.perplexity.interval95
    if quality.divergence is not None:
        divergence = facts["divergence"]
        del divergence["token_kls"]
        divergence["kl_nats"] = {**divergence.pop("kl"), "interval95": quality.divergence.kl.interval95}
        divergence["top1_agreement"] = divergence.pop("agreement")
    return facts

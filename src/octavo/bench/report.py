"""What a run of `bench` found: medians with their spread, shares of the machine's bandwidth, ratios to the peer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.bench.figures import Round, Spread, Workload
from octavo.bench.interleaved import Measured
from octavo.bench.memory import ProcessMemory
from octavo.bench.peer import PeerFacts
from octavo.bench.subject import Facts

_RATES = ("prefill_tokens_per_second", "decode_tokens_per_second", "total_tokens_per_second")


@dataclass(frozen=True, slots=True)
class Speeds:
    prefill_tokens_per_second: Spread
    decode_tokens_per_second: Spread
    first_token_seconds: Spread
    total_tokens_per_second: Spread

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> Speeds:
        return cls(
            **{
                field.name: Spread.of([getattr(each, field.name) for each in rounds])
                for field in dataclasses.fields(Round)
            }
        )


@dataclass(frozen=True, slots=True)
class Report:
    workload: Workload
    facts: Facts
    memory: ProcessMemory
    octavo: Speeds
    peer_facts: PeerFacts | None
    peer: Speeds | None
    ratios: dict[str, Spread] | None
    """Octavo's rate over the peer's, within each round."""
    read_bandwidth: Spread | None
    """Bytes a second."""
    bandwidth_share: Spread | None
    """Of it that decoding's weights take, within each round."""

    @property
    def formats_differ(self) -> bool:
        return self.peer_facts is not None and _types(self.peer_facts.format) != _types(self.facts.quant)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, numbers and strings."""
        peer = None
        if self.peer_facts is not None and self.peer is not None:
            peer = {
                **dataclasses.asdict(self.peer_facts),
                **dataclasses.asdict(self.peer),
                "formats_differ": self.formats_differ,
            }
        return {
            "workload": dataclasses.asdict(self.workload),
            **dataclasses.asdict(self.facts),
            **dataclasses.asdict(self.memory),
            **dataclasses.asdict(self.octavo),
            "read_bandwidth_bytes_per_second": _plain(self.read_bandwidth),
            "bandwidth_share": _plain(self.bandwidth_share),
            "peer": peer,
            "ratio_to_peer": None
            if self.ratios is None
            else {name: _plain(spread) for name, spread in self.ratios.items()},
        }


def make_report(workload: Workload, facts: Facts, peer_facts: PeerFacts | None, measured: Measured) -> Report:
    # A decode step reads the weights once for all sequences.
    shares = [
        each.decode_tokens_per_second / workload.sequences * facts.weight_bytes_per_token / read
        for each, read in zip(measured.octavo, measured.read_bandwidth, strict=False)
    ]
    return Report(
        workload=workload,
        facts=facts,
        memory=measured.memory,
        octavo=Speeds.of(measured.octavo),
        peer_facts=peer_facts,
        peer=Speeds.of(measured.peer) if measured.peer else None,
        ratios={name: _ratio(measured, name) for name in _RATES} if measured.peer else None,
        read_bandwidth=Spread.of(measured.read_bandwidth) if measured.read_bandwidth else None,
        bandwidth_share=Spread.of(shares) if shares else None,
    )


def _ratio(measured: Measured, name: str) -> Spread:
    rate: Callable[[Round], float] = lambda each: float(getattr(each, name))  # noqa: E731
    pairs = zip(measured.octavo, measured.peer, strict=True)
    return Spread.of([rate(ours) / rate(theirs) for ours, theirs in pairs])


def _types(format: str) -> frozenset[str]:
    return frozenset(format.split(" + "))


def _plain(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else dataclasses.asdict(spread)

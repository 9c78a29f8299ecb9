"""Decode speed of random models of real shapes on the card at hand: tokens/s, share of the stream read, errors.

    python benchmarks/cuda/decode.py [--models gemma-2-2b,...] [--formats int8,...] [--tune]

Steps are replayed from one graph (model and greedy sampling), greedy, from the context given on. `--tune` finds tiles
as `octavo bench --tune` does, takes them, and prints them as a table for `tiles.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import astuple

import torch
from reference import logits_of
from shapes import FORMATS, SHAPES, random_model, read_bytes, stream_bytes_per_second

from octavo.runners.cuda.batch_decode import make_step
from octavo.runners.cuda.decode import Card
from octavo.runners.cuda.decode_attention import Sequences
from octavo.runners.cuda.device_model import DeviceModel
from octavo.runners.cuda.kv_cache import make_cache
from octavo.runners.cuda.tiles import Key, Tile
from octavo.runners.cuda.tuning import fastest_tiles


class Decoder:
    """`batch` sequences of one length on a model, from position `start`."""

    def __init__(
        self,
        model: DeviceModel,
        context_tokens: int,
        batch: int = 1,
        *,
        pdl: bool = True,
        tiles: Mapping[Key, Tile] | None = None,
        kv_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        spec = model.spec
        properties = torch.cuda.get_device_properties(0)
        self.card = Card(
            properties.name,
            properties.multi_processor_count,
            pdl and properties.major >= 9,
            properties.L2_cache_size,
            tiles or {},
        )
        self.model, self.batch, self.context_tokens = model, batch, context_tokens
        pages = context_tokens // 32
        count = len(spec.kv_groups)
        self.caches = make_cache(spec, [batch * pages + 1] * count, kv_dtype, torch.device("cuda"))
        order = torch.randperm(batch * pages, device="cuda").to(torch.int32).view(batch, pages)
        spare = torch.full((1, pages), batch * pages, dtype=torch.int32, device="cuda")
        self.positions = torch.zeros(batch + 1, dtype=torch.int32, device="cuda")
        self.last_tokens = torch.zeros(batch + 1, dtype=torch.int32, device="cuda")
        slots = torch.arange(batch, dtype=torch.int32, device="cuda")
        self.sequences = Sequences(slots, self.positions, (torch.cat((order, spare)),) * count, batch)
        self.build()

    def build(self) -> None:
        self.step = make_step(
            self.model,
            self.caches,
            self.sequences,
            self.last_tokens,
            context_tokens=self.context_tokens,
            compute_dtype=torch.bfloat16,
            card=self.card,
        )

    def capture(self) -> torch.cuda.CUDAGraph:
        self.step.forward()
        self.step.pick()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step.forward()
            self.step.pick()
        return graph

    def start(self, position: int) -> None:
        self.positions.fill_(position)
        self.last_tokens.copy_(torch.arange(1, self.batch + 2))

    def milliseconds(self, start: int, steps: int = 96, rounds: int = 5) -> float:
        """Median over rounds of the time of a step."""
        graph = self.capture()
        found = []
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(rounds + 1):
            self.start(start)
            begin.record()
            for _ in range(steps):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end) / steps)
        return sorted(found[1:])[rounds // 2]

    def error(self, tokens: int = 160, last: int = 32) -> tuple[float, int]:
        """Relative norm of the last logits against fp32 over the same tokens, and equal greedy choices."""
        graph = self.capture()
        self.start(0)
        fed, rows = [], []
        for index in range(tokens):
            # Random tokens, so that the sequence does not loop.
            self.last_tokens[: self.batch] = int(torch.randint(self.model.spec.vocab_size, ()))
            fed.append(self.last_tokens[0].clone())
            self.step.logits.fill_(torch.nan)
            graph.replay()
            if index >= tokens - last:
                rows.append(self.step.logits[0].clone())
        want = logits_of(self.model, torch.stack(fed).long(), last)
        got = torch.stack(rows)
        return float((got - want).norm() / want.norm()), int((got.argmax(1) == want.argmax(1)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--formats", default="int8,llm-int8")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--kv-dtype", choices=("bfloat16", "int8"), default="bfloat16")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--tune-seconds", type=float, default=60)
    parser.add_argument("--no-error", action="store_true")
    arguments = parser.parse_args()
    roof = stream_bytes_per_second()
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}: stream read {roof / 1e12:.2f} TB/s")
    for name in arguments.models.split(","):
        for chosen in arguments.formats.split(","):
            model = random_model(SHAPES[name], FORMATS[chosen], 8192)
            context = 32 * (-(-(arguments.context + 128) // 32))
            tiles: dict[Key, Tile] = {}
            kept = getattr(torch, arguments.kv_dtype)
            if arguments.tune:
                seconds = arguments.tune_seconds
                tiles = fastest_tiles(model, torch.bfloat16, torch.bfloat16, torch.device("cuda"), seconds)
                for key, tile in tiles.items():
                    print(f"        {key}: Tile{astuple(tile)},", flush=True)
            decoder = Decoder(model, max(512, context), arguments.batch, tiles=tiles, kv_dtype=kept)
            nbytes = read_bytes(model)
            ms = decoder.milliseconds(arguments.context)
            error = "" if arguments.no_error else "error {:.4f}, {} of 32 equal".format(*decoder.error())
            floor = nbytes / roof * 1e3
            print(
                f"{name:13s} {chosen:9s} B{arguments.batch} ctx {arguments.context} kv {arguments.kv_dtype}: "
                f"{arguments.batch * 1e3 / ms:7.1f} tok/s {ms * 1e3:8.1f} us, {nbytes / ms / 1e9:.2f} TB/s, "
                f"{floor / ms:.1%} of the read floor; {error}",
                flush=True,
            )
            del model, decoder
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

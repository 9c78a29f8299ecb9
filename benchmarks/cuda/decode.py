"""Decode speed of random models of real shapes on the card at hand: tokens/s, share of the stream read, errors.

    python benchmarks/cuda/decode.py [--models gemma-2-2b,...] [--formats int8,...] [--tune]

Steps are replayed from one graph (model and greedy sampling), greedy, from the context given on. `--tune` tries
tiles of each linear in the whole step, one linear after the other, and prints a table for `tiles.py`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch
from reference import logits_of
from shapes import FORMATS, SHAPES, random_model, read_bytes, stream_bytes_per_second

from octavo.runners.cuda import tiles
from octavo.runners.cuda.batch_decode import make_step
from octavo.runners.cuda.decode import Card
from octavo.runners.cuda.decode_attention import Sequences
from octavo.runners.cuda.device_model import DeviceModel
from octavo.runners.cuda.kv_cache import make_cache
from octavo.runners.cuda.tiles import Tile


class Decoder:
    """`batch` sequences of one length on a model, from position `start`."""

    def __init__(self, model: DeviceModel, context_tokens: int, batch: int = 1, *, pdl: bool = True) -> None:
        spec = model.spec
        properties = torch.cuda.get_device_properties(0)
        self.card = Card(
            properties.name,
            properties.multi_processor_count,
            pdl and properties.major >= 9,
            properties.L2_cache_size,
        )
        self.model, self.batch, self.context_tokens = model, batch, context_tokens
        pages = context_tokens // 32
        count = len(spec.kv_groups)
        self.caches = make_cache(spec, [batch * pages + 1] * count, torch.bfloat16, torch.device("cuda"))
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


CANDIDATES = {  # columns -> (lanes, rows, warps)
    2304: [(32, 2, 1), (32, 4, 1), (64, 4, 2), (64, 8, 2), (128, 8, 4), (256, 4, 8), (256, 8, 8)],
    2048: [(32, 2, 1), (64, 2, 2), (64, 4, 2), (128, 4, 4), (128, 8, 4)],
    9216: [(64, 2, 2), (128, 2, 4), (128, 4, 4), (256, 2, 8), (256, 4, 8)],
    4096: [(64, 2, 2), (64, 4, 2), (128, 4, 4), (128, 8, 4), (256, 4, 8), (256, 8, 8)],
    14336: [(128, 2, 4), (256, 2, 8), (256, 4, 8), (512, 2, 16)],
    8192: [(128, 2, 4), (128, 4, 4), (256, 2, 8), (256, 4, 8), (512, 2, 16)],
}


def tune(decoder: Decoder, deadline: float) -> Iterator[str]:
    """Lines of a table for `tiles.py`."""
    layer = decoder.model.layers[0]
    table = tiles.measured_tiles("hopper")
    linears = [layer.gate_up, layer.down, layer.qkv, layer.o, decoder.model.head]
    for linear in linears:
        (part,) = linear.parts
        key = (part.encoding.codec, part.encoding.group_size, part.rows, part.columns)
        found: list[tuple[float, Tile]] = []
        for lanes, rows, warps in CANDIDATES[part.columns]:
            for each in (2, 3, 4, 6, 8, 12, 16, 24):
                if each * decoder.card.multiprocessors > 2 * part.rows // rows or time.time() > deadline:
                    continue
                if each * warps > 64:
                    continue
                table[key] = Tile(lanes, rows, warps, each)
                decoder.build()
                found.append((decoder.milliseconds(128, 24, 3), table[key]))
        if found:
            found.sort(key=lambda pair: pair[0])
            table[key] = found[0][1]
            ms, t = found[0]
            others = f"2nd {found[1][0] * 1e3:.0f} {found[1][1]}; worst {found[-1][0] * 1e3:.0f}"
            tile = f"Tile({t.lanes}, {t.rows}, {t.warps}, {t.ctas_per_multiprocessor})"
            yield f"    {key}: {tile},  # step {ms * 1e3:.0f} us; {others}"
    decoder.build()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--formats", default="int8,llm-int8")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
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
            decoder = Decoder(model, max(512, context), arguments.batch)
            nbytes = read_bytes(model)
            if arguments.tune:
                for line in tune(decoder, time.time() + arguments.tune_seconds):
                    print(line, flush=True)
            ms = decoder.milliseconds(arguments.context)
            error = "" if arguments.no_error else "error {:.4f}, {} of 32 equal".format(*decoder.error())
            floor = nbytes / roof * 1e3
            print(
                f"{name:13s} {chosen:9s} B{arguments.batch} ctx {arguments.context}: "
                f"{arguments.batch * 1e3 / ms:7.1f} tok/s {ms * 1e3:8.1f} us, {nbytes / ms / 1e9:.2f} TB/s, "
                f"{floor / ms:.1%} of the read floor; {error}",
                flush=True,
            )
            del model, decoder
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

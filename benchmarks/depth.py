"""Perplexity of a language model without some of its blocks or sublayers, by method and beside the best possible; see depth.md.

python benchmarks/depth.py MODEL TEXT [--held-out TEXT] [--batches 6] [--samples 8] [--length 64] [--instances 6]

MODEL is a transformers directory. Without a held-out text the last tenth of TEXT is kept apart to measure on. Layer evaluations
are blocks or sublayers run, times batches.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import depgraph  # noqa: E402
from depgraph.errors import DepgraphError  # noqa: E402
from importance import depth  # noqa: E402
from importance.depth.greedy import greedy  # noqa: E402

Batches = list[dict[str, torch.Tensor]]
Make = Callable[[Batches], depth.Search]
PLAIN = depth.Effort(memory=0)
IN_FULL = depth.LossMetric(nonnegative=False)  # no candidate is stopped early
LARGEST_LOSS = 700.0


@dataclass(frozen=True)
class Amount:
    """How much data: batches to choose with, samples in each, tokens in each sample."""

    batches: int
    samples: int
    length: int


def scored(of: str) -> dict[str, Make]:
    """The one-shot methods."""
    return {
        "random": lambda data: depth.OneShot(depth.DepthRandom(of=of)),
        "magnitude": lambda data: depth.OneShot(depth.DepthMagnitude(of=of)),
        "magnitude+": lambda data: depth.OneShot(depth.DepthMagnitude(of=of, first=4, last=2)),
        "taylor": lambda data: depth.OneShot(depth.DepthTaylor(data, of=of)),
        "taylor+": lambda data: depth.OneShot(depth.DepthTaylor(data, of=of, first=4, last=2)),
        "block influence": lambda data: depth.OneShot(depth.BlockInfluence(data, of)),
        "output shift": lambda data: depth.OneShot(depth.OutputShift(data, of)),
        "perplexity without it": lambda data: depth.OneShot(depth.Perplexity(data, of)),
    }


def of_blocks() -> dict[str, Make]:
    """Methods that remove blocks."""
    return scored("blocks") | {
        "angular span": lambda data: depth.AngularDrop(data),
        "blocks before the last": lambda data: depth.BeforeLast(),
        "SLEB": lambda data: depth.Sleb(data),
        "SLEB, ends free": lambda data: depth.Sleb(data, first=0, last=0),
        "pairs (ours)": lambda data: depth.PairSearch(data),
        "best possible": lambda data: depth.Exhaustive(data),
    }


def of_sublayers() -> dict[str, Make]:
    """Methods that remove attention and MLP sublayers."""
    names = ("norm", "angular", "kl", "js", "js-reversed")
    finer: dict[str, Make] = {f"FinerCut, {name}": lambda data, name=name: depth.FinerCut(data, name) for name in names}
    return (
        scored("branches")
        | finer
        | {
            "FinerCut, js, late 0.4": lambda data: depth.FinerCut(data, late=0.4),
            "pairs (ours)": lambda data: depth.PairSearch(data, of="branches"),
            "best possible": lambda data: depth.Exhaustive(data, of="branches", most=300),
        }
    )


@dataclass
class Bench:
    """A model, data to choose with and data to measure on."""

    model: Any
    calibration: Batches
    held_out: Batches
    judges: dict[str, depth.Engine] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph = depgraph.trace(self.model, kwargs=self.calibration[0])
        for of in ("blocks", "branches"):
            names = [part.name for part in getattr(self.graph, of)]
            self.judges[of] = depth.Engine(self.graph, self.held_out, names)

    def perplexity(self, of: str, gone: Sequence[str]) -> float:
        """That on the held-out text."""
        return math.exp(min(self.judges[of].value(gone), LARGEST_LOSS))

    def row(self, of: str, make: Make, counts: Sequence[int]) -> str:
        """Held-out perplexity for each count; layer evaluations and seconds for the last one that the method can do."""
        cells, cost = [], "- | -"
        for count in counts:
            begin = time.perf_counter()
            try:
                order = make(self.calibration)(self.graph, count)
            except DepgraphError:
                cells.append("-")
                continue
            cost = f"{order.evaluations or '-'} | {time.perf_counter() - begin:.1f}"
            cells.append(f"{self.perplexity(of, order.names):.2f}")
        return " | ".join([*cells, cost])

    def table(self, of: str, methods: dict[str, Make], counts: Sequence[int]) -> None:
        """All methods against how many go."""
        heads = " | ".join(f"{count} gone" for count in counts)
        print(f"\n| {of} | {heads} | evaluations | seconds |\n|---|{'---|' * (len(counts) + 2)}")
        for name, make in methods.items():
            print(f"| {name} | {self.row(of, make, counts)} |", flush=True)


def searches(graph: depgraph.DependencyGraph, instances: Sequence[Batches], counts: Sequence[int]) -> None:
    """How often a search finds the best set of blocks on its own data, and for how many layer evaluations."""
    makes: dict[str, Make] = {name: of_blocks()[name] for name in ("SLEB, ends free", "pairs (ours)", "best possible")}
    print("\n| search of blocks | gone | best set found | mean excess of loss | evaluations |\n|---|---|---|---|---|")
    for count in counts:
        found = {name: [make(data)(graph, count) for data in instances] for name, make in makes.items()}
        best = [order.value for order in found["best possible"]]
        for name, orders in found.items():
            over = [order.value - value for order, value in zip(orders, best, strict=True)]
            hits = sum(excess < 1e-9 for excess in over)
            cost = sum(order.evaluations for order in orders) / len(orders)
            print(
                f"| {name} | {count} | {hits} of {len(orders)} | {sum(over) / len(over):.4f} | {cost:.0f} |", flush=True
            )


def sleb_in_full(data: Batches) -> depth.Search:
    """SLEB as published: for each candidate all blocks that are left run on all data."""
    return depth.Sleb(data, metric=IN_FULL, effort=PLAIN)


def finercut_in_full(data: Batches) -> depth.Search:
    """FinerCut as published, likewise."""

    def search(graph: depgraph.DependencyGraph, count: int, /) -> depth.Order:
        names = [branch.name for branch in graph.branches]
        engine = depth.Engine(graph, data, names, depth.Distance("js", nonnegative=False), PLAIN)
        return greedy(engine, count, lambda gone: names)

    return search


def published(rows: Sequence[tuple[str, depgraph.DependencyGraph, Batches, int, tuple[Make, Make]]]) -> None:
    """Layer evaluations and seconds of searches as published, by the same runner, beside ours."""
    print(
        "\n| search | as published | seconds | ours | seconds | share | same choices |\n|---|---|---|---|---|---|---|"
    )
    for name, graph, data, count, makes in rows:
        orders, seconds = [], []
        for make in makes:
            begin = time.perf_counter()
            orders.append(make(data)(graph, count))
            seconds.append(f"{time.perf_counter() - begin:.1f}")
        plain, ours = orders
        same = "yes" if plain.names == ours.names else "no"
        cells = [
            plain.evaluations,
            seconds[0],
            ours.evaluations,
            seconds[1],
            f"{ours.evaluations / plain.evaluations:.0%}",
        ]
        print("| " + " | ".join(map(str, [name, *cells, same])) + " |", flush=True)


def latencies(graph: depgraph.DependencyGraph, batch: dict[str, torch.Tensor], rounds: int = 15) -> None:
    """Time of the model without a quarter, half and three quarters of its blocks beside the whole one's, all in turns."""
    blocks = [block.name for block in graph.blocks]
    gone = [len(blocks) * quarter // 4 for quarter in range(4)]
    models = [graph.cut_plan(branches=blocks[:n]).apply() if n else graph.model for n in gone]
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(rounds):
            for model, taken in zip(models, times, strict=True):
                begin = time.process_time()
                model(**batch)
                taken.append(time.process_time() - begin)
    whole = statistics.median(times[0])
    print("\n| blocks gone | of blocks left | of time |\n|---|---|---|")
    for n, taken in zip(gone, times, strict=True):
        print(f"| {n} | {1 - n / len(blocks):.0%} | {statistics.median(taken) / whole:.0%} |")


def layers_32(amount: Amount) -> tuple[depgraph.DependencyGraph, Batches]:
    """A random model of 32 layers, and random tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32, vocab_size=128, **sizes)).eval()
    tokens = torch.randint(0, 128, (amount.batches * amount.samples * amount.length,))
    data = depth.windows(tokens, amount.length, amount.batches * amount.samples, batch=amount.samples)
    return depgraph.trace(model, kwargs=data[0]), data


def batches(tokens: torch.Tensor, amount: Amount) -> Batches:
    """Windows spread evenly over a text."""
    rows = depth.windows(tokens, amount.length, len(tokens))
    count = amount.batches * amount.samples
    ids = torch.cat([row["input_ids"] for row in rows[:: max(1, len(rows) // count)][:count]])
    return [{"input_ids": part} for part in ids.split(amount.samples)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--held-out", type=Path, metavar="TEXT")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--instances", type=int, default=6)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--sublayers", type=int, nargs="+", default=[2, 4, 6, 8])
    chosen = parser.parse_args()
    amount = Amount(chosen.batches, chosen.samples, chosen.length)
    text = chosen.text.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32).eval()

    def tokens(part: str) -> torch.Tensor:
        return torch.tensor(tokenizer.encode(part[:200_000], add_special_tokens=False, verbose=False))

    aside = len(text) - len(text) // 10
    used, measured = (text[:aside], text[aside:])
    if chosen.held_out is not None:
        used, measured = text, chosen.held_out.read_text(encoding="utf-8")
    bench = Bench(model, batches(tokens(used), amount), batches(tokens(measured), Amount(4, 8, amount.length)))
    print(f"whole model: held-out perplexity {bench.perplexity('blocks', ()):.2f}")
    told: Make = lambda data: depth.Exhaustive(bench.held_out)  # noqa: E731
    bench.table("blocks", of_blocks() | {"best for the held-out text itself": told}, chosen.blocks)
    bench.table("branches", of_sublayers(), chosen.sublayers)
    size = len(text) // 2 // chosen.instances
    one = Amount(1, amount.samples, amount.length)
    instances = [batches(tokens(text[k * size : (k + 1) * size]), one) for k in range(chosen.instances)]
    searches(bench.graph, instances, (2, 3))
    most = max(chosen.blocks)
    latencies(bench.graph, bench.calibration[0])
    deep, tokens_32 = layers_32(amount)
    sleb, finercut = (sleb_in_full, depth.Sleb), (finercut_in_full, depth.FinerCut)
    published(
        [
            (f"SLEB, {most} blocks", bench.graph, bench.calibration, most, sleb),
            ("SLEB, 7 of 32 random blocks", deep, tokens_32, 7, sleb),
            ("FinerCut, 4 of 64 random sublayers", deep, tokens_32, 4, finercut),
        ]
    )


if __name__ == "__main__":
    main()

"""Perplexity of a Llama-like language model after pruning, by score and by how the budget is spread; see scores.md.

python benchmarks/scores.py MODEL TEXT [--held-out TEXT] [--seeds 5] [--keep 0.8 0.6]

MODEL is a transformers directory. Without --held-out the last 300,000 characters of TEXT are kept apart to measure on.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from demo import perplexity, windows  # noqa: E402

import depgraph  # noqa: E402
import importance  # noqa: E402
from depgraph.errors import DepgraphError  # noqa: E402

Pick = Callable[[depgraph.Axis], bool]
KINDS = ("hidden width", "MLP neurons", "KV heads", "query heads", "rotary pairs", "value dims")
SAVED_ALONE = 0.05
SHARE_OF_A_BLOCK = 0.2


def kind(axis: depgraph.Axis) -> str:
    """Which of `KINDS` an axis of a Llama is."""
    if not axis.exact:
        return "hidden width"
    if any("inv_freq" in m.target for m in axis.members):
        return "rotary pairs"
    found = {".mlp.": "MLP neurons", "/blocks": "KV heads", "v_proj": "value dims"}
    return next((name for part, name in found.items() if part in axis.name), "query heads")


def block(axis: depgraph.Axis) -> int:
    """The number of the block that an axis lies in, -1 if in several."""
    numbers = {int(n) for m in axis.members for n in re.findall(r"\.(\d+)\.", m.target)}
    return numbers.pop() if len(numbers) == 1 else -1


@dataclass(frozen=True)
class Setting:
    """Which axes may be cut, and how the budget is spread over them."""

    name: str
    scope: str
    only: Pick


class Bench:
    """A model, its axes and the scores of all groups."""

    def __init__(self, model: Any, calibration: list[torch.Tensor], held_out: list[torch.Tensor], seeds: int) -> None:
        self.model, self.held_out = model, held_out
        self.graph = depgraph.trace(model, kwargs={"input_ids": calibration[0][:2]})
        self.random = [importance.Random(seed)(self.graph) for seed in range(seeds)]
        self.scores = {
            "magnitude": importance.Magnitude()(self.graph),
            "taylor": importance.Taylor(calibration)(self.graph),
        }
        self.last = max(block(axis) for axis in self.graph.axes)

    def settings(self) -> list[Setting]:
        """Everything by three scopes; heads and neurons as LLM-Pruner's block-wise pruning, with and without the ends."""

        def units(axis: depgraph.Axis) -> bool:
            return kind(axis) in ("MLP neurons", "KV heads")

        def inner(axis: depgraph.Axis) -> bool:
            return units(axis) and block(axis) not in (0, self.last)

        return [
            *(Setting("everything", scope, lambda axis: True) for scope in ("global", "axis", "uniform")),
            *(Setting("KV heads, neurons", scope, units) for scope in ("global", "axis")),
            *(Setting("the same, ends whole", scope, inner) for scope in ("global", "axis")),
        ]

    def row(self, cut: Callable[[Any], float]) -> str:
        """What `cut` makes of every score: Random's mean and range, Magnitude, Taylor."""
        try:
            drawn = [cut(scores) for scores in self.random]
            rest = [f"{cut(scores):.1f}" for scores in self.scores.values()]
        except DepgraphError:
            return "can't get there"
        return f"{statistics.mean(drawn):.1f} ({min(drawn):.1f} to {max(drawn):.1f}) | " + " | ".join(rest)

    def planned(self, setting: Setting, keep: float) -> str:
        """A row for a share of parameters to keep."""
        target = depgraph.Target(params=keep)
        options: dict[str, Any] = {"scope": setting.scope, "only": setting.only}
        return self.row(lambda scores: self.quality(self.graph.plan(scores, target, **options)))

    def of_block(self, number: int) -> str:
        """A row for a share of the neurons of one block."""
        axis = next(a for a in self.graph.axes if kind(a) == "MLP neurons" and block(a) == number)
        count = round(SHARE_OF_A_BLOCK * axis.size)
        return self.row(
            lambda scores: self.quality(
                self.graph.cut_plan({axis.name: scores[axis.name].argsort(kind="stable")[:count]})
            )
        )

    def quality(self, plan: depgraph.Plan) -> float:
        """Held-out perplexity of the pruned model."""
        return perplexity(plan.apply(check="none"), self.held_out)

    def shares(self, scores: Any, keep: float) -> str:
        """The share of all parameters that each kind of axis gives up under scope="global"."""
        plan = self.graph.plan(scores, depgraph.Target(params=keep), scope="global")
        dense, found = self.graph.dense_cost.params, []
        for name in KINDS:
            part = {a: groups for a, groups in plan.removal.items() if kind(self.graph[a]) == name}
            found.append(f"{1 - self.graph.cost(part).params / dense:.0%}")
        return " | ".join(found)


def report(bench: Bench, keeps: list[float]) -> None:
    """All tables, as Markdown."""
    scores = "random: mean (range) | magnitude | taylor |"
    print(f"dense perplexity {perplexity(bench.model, bench.held_out):.1f}\n")
    print(f"| kept | axes | scope | {scores}\n|---|---|---|---|---|---|")
    for keep in keeps:
        for setting in bench.settings():
            print(f"| {keep:.0%} | {setting.name} | {setting.scope} | {bench.planned(setting, keep)} |", flush=True)
    print(f'\n| parameters saved by scope="global" | {" | ".join(KINDS)} |\n|---|---|---|---|---|---|---|')
    for keep in keeps:
        for name, found in {"random (seed 0)": bench.random[0], **bench.scores}.items():
            print(f"| {name}, {keep:.0%} kept | {bench.shares(found, keep)} |")
    print(f"\n| one kind alone, {SAVED_ALONE:.0%} of the model saved | {scores}\n|---|---|---|---|")
    for name in KINDS:
        alone = Setting(name, "axis", lambda axis, name=name: kind(axis) == name)  # type: ignore[misc]
        print(f"| {name} | {bench.planned(alone, 1 - SAVED_ALONE)} |", flush=True)
    print(f"\n| {SHARE_OF_A_BLOCK:.0%} of the neurons of block | {scores}\n|---|---|---|---|")
    for number in range(bench.last + 1):
        print(f"| {number} | {bench.of_block(number)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6])
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    text = given.text.read_text(encoding="utf-8")
    apart = min(300_000, len(text) // 2)
    train, test = (
        (text, given.held_out.read_text(encoding="utf-8")) if given.held_out else (text[:-apart], text[-apart:])
    )
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    report(Bench(model, windows(tokenizer, train, 8, 8), windows(tokenizer, test, 8, 8), given.seeds), given.keep)


if __name__ == "__main__":
    main()

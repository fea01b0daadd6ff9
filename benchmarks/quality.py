"""Quality after pruning, and what it costs, of every recipe on small trained models; see quality.md for what came out.

python benchmarks/quality.py --data DIR [--report benchmarks/quality.md]     all models, a fresh process each
python benchmarks/quality.py --models digits-cnn digits-vit --recipes obs flap
python benchmarks/quality.py --causal DIR TEXT                               any causal language model of transformers

DIR of --data holds stories260k-llama, deep12-llama and text. Results are kept as JSON lines, one for each model, recipe, share
of parameters and seed of the calibration data; a run goes on where an earlier one stopped. What raises is a result too.
"""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import argparse
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import quality_report  # noqa: E402
import quality_subjects as qs  # noqa: E402
import torch  # noqa: E402
from measuring import Stopwatch, give_back_freed, parameters, resident, seconds  # noqa: E402
from transformers.utils import logging  # noqa: E402

import depgraph  # noqa: E402
from depgraph.errors import DepgraphError  # noqa: E402
from importance import recipes  # noqa: E402
from importance.calling import loss_of  # noqa: E402
from importance.remembered import remembering  # noqa: E402

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "depgraph"
Record = dict[str, Any]
KEY = ("model", "recipe", "keep", "seed", "calibration", "held_out")


def read(path: Path) -> list[Record]:
    """The results there are, the last of each."""
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [json.loads(line) for line in lines if line.strip()]
    return list({tuple(r[k] for k in KEY): r for r in found}.values())


class Results:
    """The file of results of one model: what isn't in it yet is measured and added."""

    def __init__(self, path: Path, model: str, sizes: qs.Sizes) -> None:
        self.path, self.common = path, {"model": model, **vars(sizes)}
        self.known = {tuple(r[k] for k in KEY) for r in read(path)}
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, what: Record, measure: Callable[[], Record]) -> None:
        """Measure for a recipe, share and seed, and keep what came out, or why nothing did."""
        record: Record = {**self.common, "keep": None, "seed": None, **what}
        if tuple(record[k] for k in KEY) in self.known:
            return
        try:
            record |= measure()
        except Exception as error:  # whatever a recipe raises is what it does on this model
            lines = str(error).splitlines() or [""]
            record["failed"] = f"{type(error).__name__}: {lines[0]}"
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        told = next(record[field] for field in ("failed", "quality", "seconds", "recipe") if field in record)
        print(*(record[k] for k in KEY[:4] if record[k] is not None), told, flush=True)


def measured(call: Callable[[], Any]) -> tuple[Any, Record]:
    """What a call returns, with its CPU seconds and how many MB over what was held before it took at its peak."""
    give_back_freed()
    before, watch = resident(), Stopwatch()
    with watch.phase("call"):
        result = call()
    spent = watch.phases["call"]
    return result, {"seconds": spent["cpu"], "mb": max(0.0, spent["peak"] - before)}


class Bench:
    """One model in this process: its graph, calibration data by seed, and what is asked of it."""

    def __init__(self, subject: qs.Subject, given: argparse.Namespace) -> None:
        self.subject, self.given = subject, given
        self.graph = depgraph.trace(subject.model, kwargs=subject.example())
        self.batches = {seed: subject.batches(seed) for seed in range(given.seeds)}
        self.made: dict[tuple[str, int], recipes.Recipe] = {}

    def forward(self) -> None:
        """One pass over the calibration data."""
        with torch.no_grad():
            for batch in self.batches[0]:
                self.subject.model(**{k: v for k, v in batch.items() if k != "labels"})

    def backward(self) -> None:
        """One pass with gradients."""
        model = self.subject.model
        for batch in self.batches[0]:
            loss_of(model, batch, self.subject.loss).backward()
            model.zero_grad(set_to_none=True)

    def dense(self) -> Record:
        """The model itself, with the units that costs are given in."""
        weights = sum(p.numel() * p.element_size() for p in self.subject.model.parameters()) / 2**20
        spent = {"seconds": seconds(self.forward, 3), "mb": measured(self.forward)[1]["mb"]}
        both = {"backward_seconds": seconds(self.backward, 3), "backward_mb": measured(self.backward)[1]["mb"]}
        quality = self.subject.quality(self.subject.model)
        return {"metric": self.subject.metric, "quality": quality, "weights_mb": weights, **spent, **both}

    def recipe(self, name: str, seed: int) -> recipes.Recipe:
        """A recipe with the data of a seed."""
        return recipes.named(name, self.batches[seed], self.subject.loss, seed)

    def cost(self, name: str) -> Record:
        """What scoring alone takes, where a recipe has a score."""
        score = getattr(self.recipe(name, 0), "score", None)
        return measured(lambda: score(self.graph))[1] if score is not None else {}

    def prune(self, name: str, keep: float, seed: int) -> Record:
        """One pruned model, and for the first of a recipe and seed what it took: others take the same scores again."""
        first, target = (name, seed) not in self.made, depgraph.Target(params=keep)
        recipe = self.made.setdefault((name, seed), remembering(self.recipe(name, seed)))
        pruned, spent = measured(lambda: recipe.prune(self.graph, target))
        quality = self.subject.quality(pruned.model)
        if not math.isfinite(quality):
            raise ArithmeticError(f"the {self.subject.metric} is {quality}")
        kept = parameters(pruned.model) / parameters(self.subject.model)
        return {"quality": quality, "kept": kept, **(spent if first else {})}


def seeds_of(name: str, count: int) -> range:
    """The seeds that make a difference to a recipe: one is enough where it takes neither data nor a seed."""
    varies = {"batches", "seed"} & set(recipes.RECIPES[name].make.__annotations__)
    return range(count if varies else 1)


def work(name: str, given: argparse.Namespace) -> None:
    """All measurements of one model, in a process of its own."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bench = Bench(subjects(given)[name]().on(given.device), given)
    results = Results(given.results, name, sizes_of(given))
    with suppress(DepgraphError):  # what is imported on the first use doesn't count
        bench.recipe("wanda_sp", 0).prune(bench.graph, depgraph.Target(params=0.95))
    results.add({"recipe": "dense"}, bench.dense)
    for recipe in given.recipes:
        results.add({"recipe": recipe}, lambda recipe=recipe: bench.cost(recipe))
        for seed in seeds_of(recipe, given.seeds):
            for keep in given.keep:
                what = {"recipe": recipe, "keep": keep, "seed": seed}
                results.add(what, lambda what=what: bench.prune(what["recipe"], what["keep"], what["seed"]))


def sizes_of(given: argparse.Namespace) -> qs.Sizes:
    return qs.Sizes(given.calibration, given.held_out)


def subjects(given: argparse.Namespace) -> dict[str, Callable[[], qs.Subject]]:
    """The models to choose from: those that are known, or those of --causal."""
    sizes = sizes_of(given)
    theirs = {f.resolve().name: lambda f=f, t=t: qs.from_file(f, t, sizes) for f, t in given.causal}
    return theirs or qs.subjects(given.data, given.weights, sizes)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="stories260k-llama, deep12-llama and text")
    parser.add_argument("--weights", type=Path, default=CACHE / "digits", help="of examples/digits.py (%(default)s)")
    parser.add_argument("--causal", type=Path, nargs=2, action="append", default=[], metavar=("DIR", "TEXT"))
    parser.add_argument("--models", nargs="+", metavar="NAME", help="some models")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", default=list(recipes.RECIPES), choices=recipes.RECIPES)
    parser.add_argument("--keep", type=float, nargs="+", default=KEEPS, help="shares of parameters (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="draws of calibration data (%(default)s)")
    parser.add_argument("--calibration", type=int, default=64, help="sequences (%(default)s)")
    parser.add_argument("--held-out", type=int, default=64, help="sequences to measure on (%(default)s)")
    parser.add_argument("--device", default="cpu", help="where to prune (%(default)s)")
    parser.add_argument("--results", type=Path, default=CACHE / "quality.jsonl", help="their file (%(default)s)")
    parser.add_argument("--report", type=Path, help="write the tables as Markdown here, and a plot beside it")
    parser.add_argument("--list", action="store_true", help="don't run anything, use the results there are")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    known = subjects(given)
    names = given.models or list(known)
    unknown = sorted(set(names) - set(known))
    if unknown:
        sys.exit(f"there is no model {', '.join(unknown)}: choose from {', '.join(known)}")
    if given.worker:
        try:
            return work(given.worker, given)
        except qs.NotHere as missing:
            return print(f"{given.worker} is left out: {missing}", flush=True)
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--worker"]
    ended = {name: subprocess.run([*command, name]).returncode for name in names if not given.list}
    found = [r for r in read(given.results) if r["model"] in names and r["recipe"] in (*given.recipes, "dense")]
    found = [r for r in found if (r["calibration"], r["held_out"]) == (given.calibration, given.held_out)]
    if given.report:
        quality_report.write(given.report, found)
    if any(ended.values()):
        sys.exit(f"not measured to the end: {', '.join(name for name, code in ended.items() if code)}")


if __name__ == "__main__":
    main()
